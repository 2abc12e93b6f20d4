"""A chat template is a program of the checkpoint's author: it is tried before anything waits for it."""

import json
import resource
import signal

import pytest

from gendistill import chat_templates
from gendistill.checkpoints.resolve import load_tokenizer
from gendistill.errors import CheckpointError
from gendistill.testing import save_tiny_checkpoint

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
HOSTILE = {
    "endless": ENDLESS.replace("BODY", ""),
    "endless text": ENDLESS.replace("BODY", "x"),
    "a long text": "{{ messages[0]['content'] * 100000 }}",
    "a text beyond the memory": "{{ 'x' * 9999999999 }}",
}


@pytest.fixture
def folder(tmp_path):
    return save_tiny_checkpoint(tmp_path / "teacher", "llama", vocab_size=259)


def give_template(folder, template):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


@pytest.mark.parametrize("named", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_end_or_measure_is_refused(folder, template, named, monkeypatch):
    monkeypatch.setattr(chat_templates, "_MOST_SECONDS", 0.3)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    entry = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": template}]
    give_template(folder, entry if named else template)
    with pytest.raises(CheckpointError, match=r"chat template .* one short question") as caught:
        load_tokenizer(folder)
    assert "chat_template.jinja" in (caught.value.hint or "")
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message') }}", "{% for %}", "{{ nothing.here }}", "\ud83d", ""]
)
def test_what_a_template_refuses_is_left_to_whoever_asks(folder, template):
    give_template(folder, template)
    assert load_tokenizer(folder).chat_template == template
