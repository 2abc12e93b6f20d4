"""Generation settings count wherever they are stored, and are refused in the same words."""

import json

import pytest
import torch
from transformers import GenerationConfig

from gendistill.models.io import load_student
from gendistill.testing import tiny_student

IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(1))
LENGTH = {"max_new_tokens": 3, "pad_token_id": 0}
REFUSED = [
    {"cache_implementation": "quantized"},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "offloaded_static"},
    {"prompt_lookup_num_tokens": 2},
    {"assistant_early_exit": 1},
    {"is_assistant": True},
]
FINE = [
    {"cache_implementation": "dynamic"},
    {"use_cache": False},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"guidance_scale": 1.5},
    {"num_beams": 2},
    {"prefill_chunk_size": 3},
    {"num_assistant_tokens": 4},
]


def ways(placement, settings, folder):
    """Generate with a setting given in every way."""

    def stored(model):
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        return model

    def from_folder():
        tiny_student("llama", placement).save_pretrained(folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    yield lambda: tiny_student("llama", placement).generate(IDS, **LENGTH, **settings)
    yield lambda: stored(tiny_student("llama", placement)).generate(IDS, **LENGTH)
    given = GenerationConfig(**LENGTH, **settings)
    yield lambda: tiny_student("llama", placement).generate(IDS, generation_config=given)
    yield lambda: tiny_student("llama", placement).generate(IDS, given)
    yield lambda: stored(tiny_student("llama", placement)).generate(IDS, GenerationConfig(**LENGTH))
    yield lambda: load_student(from_folder()).generate(IDS, **LENGTH)
    yield lambda: tiny_student("llama", placement).generate(
        IDS, generation_config=GenerationConfig.from_pretrained(from_folder()), **LENGTH
    )


@pytest.mark.parametrize("placement", ["mixed", "pure"])
@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_what_a_state_cannot_do_is_refused_wherever_it_is_said(tmp_path, placement, settings):
    messages = set()
    for generate in ways(placement, settings, tmp_path):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}.*leave it out") as caught:
            generate()
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("placement", ["mixed", "pure"])
@pytest.mark.parametrize("settings", FINE, ids=str)
@torch.no_grad()
def test_other_settings_work_wherever_they_are_said(tmp_path, placement, settings):
    texts = [generate() for generate in ways(placement, settings, tmp_path)]
    assert texts[0].shape == (2, 11)
    assert all(torch.equal(text, texts[0]) for text in texts)


@torch.no_grad()
def test_a_stored_static_cache_works_beside_attention_only(tmp_path):
    *_, stored, _ = ways("mixed", {"cache_implementation": "static"}, tmp_path)
    assert torch.equal(stored(), tiny_student().generate(IDS, **LENGTH))
    for generate in ways("pure", {"cache_implementation": "static"}, tmp_path):
        with pytest.raises(ValueError, match='cache_implementation="static" cannot hold this student'):
            generate()
