"""Our models in lm-eval: its requests on the generation engine, under the name "gendistill".

Prompts are tokenised, cut and ended as lm-eval's own ``hf`` model does it, so that scores are the same beyond rounding.
Importing this module registers the model.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gendistill.checkpoints.resolve import load_tokenizer, resolve_checkpoint
from gendistill.errors import GendistillError, RecipeError
from gendistill.generation.request import Prompt
from gendistill.generation.sampling import Sampling
from gendistill.generation.stops import whole_text
from gendistill.runs.asking import EngineModel, asked
from gendistill.runs.named import model_of
from gendistill.runs.scoring import choose_device, load_teacher
from gendistill.text import printable
from gendistill_evals.decoding import end_tokens
from gendistill_evals.model import Decoding, Pair, Request

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NAME = "gendistill"
# where lm-eval prints what its parts log
_LOG = logging.getLogger("lm_eval.models.gendistill")
_WHERE = "--model_args"
_NEW_TOKENS = 256
_AUTO = "auto"
# keys of generation_kwargs that we act upon
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")
# stop texts, sampling and length of a request
_Rules = tuple[tuple[str, ...], Sampling, int]


class _Ask(NamedTuple):
    """A text to go on from, and its number among the requests."""

    number: int
    token_ids: list[int]
    stop: tuple[str, ...]
    max_new_tokens: int


@register_model(NAME)
class GendistillLM(TemplateLM):
    """Any model that gendistill takes, as lm-eval asks models.

    Args:
        pretrained: Hub id, folder, ``.gguf`` file or ``pypi:<package>``; a recipe or run folder for its student.
        revision: Branch, tag or commit of a hub id; version of a package.
        dtype: ``auto`` (bfloat16 on a GPU that has it, else float32), ``float32`` or ``bfloat16``.
        device: As torch calls it; ``auto`` or None for the best there is.
        batch_size: Sequences at a time; ``auto`` or None for as many as memory allows.
        max_batch_size: Bound of ``auto``.
        max_length: Longest sequence in tokens; None for the model's positions.
        max_gen_toks: Longest answer where a task does not say.
        add_bos_token: Whether texts begin with the tokenizer's first token; None leaves it to the tokenizer.
        enable_thinking: Given to the chat template; None leaves it to the template.
        seed: Of the draws, where a task samples; request n draws with this seed plus n.
        trust_remote_code: Has no effect and is said to have none: code of checkpoints is never run.
    Raises:
        RecipeError: An argument that does not exist or cannot be meant.
        CheckpointError: A model that cannot be found or loaded.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        revision: str = "main",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _NEW_TOKENS,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        _check_arguments(pretrained, others, dtype)
        if trust_remote_code:
            _LOG.warning("trust_remote_code has no effect: gendistill runs no code of checkpoints")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError(
                "the gendistill model runs in one process, and there are several",
                where="WORLD_SIZE",
                hint="gendistill lm-eval ..., without a launcher",
            )
        name = model_of(str(pretrained), where=f"{_WHERE} pretrained")
        place = choose_device(None if device == _AUTO else device, where="--device", hint="--device cpu")
        checkpoint = resolve_checkpoint(name, revision=str(revision), where=f"{_WHERE} pretrained")
        self.tokenizer: Any = load_tokenizer(checkpoint.folder)
        model = load_teacher(checkpoint, dtype, place)
        self._stack = ExitStack()
        rows = _rows(batch_size, max_batch_size)
        self.language_model = self._stack.enter_context(
            asked(model, self.tokenizer, batch_size=rows, say=_LOG.warning)
        )
        self.batch_size = _AUTO if rows is None else rows
        self.max_length = self._longest(max_length)
        self.max_gen_toks, self.add_bos_token, self.seed = max_gen_toks, add_bos_token, seed
        self._thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._device = place
        self._spec, self._fingerprint = str(pretrained), checkpoint.fingerprint
        asked_for = self.language_model.generation_defaults
        self.end_ids = end_tokens(self.tokenizer, None, asked_for)
        if ignored := sorted(_SHAPES & {key for key, value in asked_for.items() if value is not None}):
            _LOG.warning("of the checkpoint's generation settings, %s have no effect", ", ".join(ignored))

    def close(self) -> None:
        """Let the engine's memory go."""
        self._stack.close()

    def _longest(self, given: int | None) -> int | None:
        known = self.language_model.max_tokens
        if given is None:
            return known
        if given < 1 or (known is not None and given > known):
            raise RecipeError(
                f"max_length must be from 1 to the model's positions, {known or 'which are unlimited'}, got {given}",
                where=f"{_WHERE} max_length",
                hint="leave it out for the model's own",
            )
        return given

    # ----- what lm-eval asks about a model -----

    @property
    def eot_token_id(self) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tokenizer's end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored after: the first token, else the end token."""
        first = self.tokenizer.bos_token_id
        found = self.eot_token_id if first is None else first
        if found is None:
            raise GendistillError(
                "an empty context needs a first or an end token, and the tokenizer has neither",
                where=self._spec,
                hint="ask with a task whose contexts are not empty",
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """Name in the keys of lm-eval's request cache."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes of a model into its results."""
        model, setup = self.language_model.model, self.language_model.setup()
        return {
            "model_num_parameters": sum(part.numel() for part in model.parameters()),
            "model_dtype": setup.dtype,
            "model_revision": "",
            "model_sha": self._fingerprint,
            "gendistill_runs_on": "engine"
            if isinstance(self.language_model, EngineModel)
            else "transformers",
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render turns; without ``add_generation_prompt`` the last one is left open."""
        if not self.tokenizer.chat_template:
            raise GendistillError(
                "the tokenizer has no chat template", where=self._spec, hint="leave out --apply_chat_template"
            )
        from jinja2 import TemplateError

        def render(turns: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._thinking,
            )

        try:
            return render(chat_history)
        except TemplateError as error:
            spoken = [turn for turn in chat_history if turn["role"] != "system"]
            if len(spoken) == len(chat_history):
                raise
            _LOG.warning("the chat template takes no system turn, which is left out: %s", error)
            return render(spoken)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise a text; a first token that stands in it already is not added once more."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self._begins(string):
            special = False
        chosen = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **chosen))

    def _begins(self, text: str) -> bool:
        first = self.tokenizer.bos_token_id
        first = self.eot_token_id if first is None else first
        return first is not None and text.startswith(self.tokenizer.decode(first))

    # ----- likelihood -----

    def _loglikelihood_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = []
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            kept, lost = self._fitting(context, continuation, number)
            cut += lost > 0
            pairs.append(Pair(kept, continuation, f"request {number}"))
        self._say_cut(cut, len(pairs), "contexts")
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for number, log_probs, greedy in self.language_model.scores(pairs):
                found[number] = (math.fsum(log_probs), greedy)
                text = requests[number][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, found[number])
                bar.update()
        return found

    def _fitting(self, context: list[int], continuation: list[int], number: int) -> tuple[list[int], int]:
        """Cut a context from the left until it fits; returns how many tokens it lost."""
        if not continuation:
            raise GendistillError(
                "a continuation has no token of its own: the tokenizer joins it to the context",
                where=f"request {number}",
                hint="let the task's target_delimiter or choices begin with a space",
            )
        if self.max_length is None:
            return context, 0
        # the last token is predicted and not read
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise GendistillError(
                f"a continuation has {len(continuation):,} tokens, and the model reads {self.max_length:,}",
                where=f"request {number}",
                hint="use shorter texts, or a model with more positions",
            )
        return context[-room:], max(0, len(context) - room)

    def loglikelihood_rolling(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts; longer ones in windows, of which each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            token_ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(
                token_list=token_ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length or len(token_ids) + 1,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                of.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(
            of, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ----- generation -----

    def generate_until(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Answer prompts: greedy unless a task samples, up to the first of its stop texts."""
        groups: dict[Sampling, list[_Ask]] = defaultdict(list)
        cut = 0
        for number, request in enumerate(requests):
            arguments: tuple[Any, ...] = request.args
            context, settings = arguments[0], arguments[1]
            stop, sampling, new_tokens = self._rules(settings, f"request {number}")
            token_ids = self.tok_encode(context)
            if self.max_length is not None:
                room = self.max_length - new_tokens
                if room < 1:
                    raise GendistillError(
                        f"an answer of {new_tokens:,} tokens leaves no room for a prompt: the model reads "
                        f"{self.max_length:,}",
                        where=f"request {number}, max_gen_toks",
                        hint="--gen_kwargs max_gen_toks=N with a smaller N",
                    )
                cut += len(token_ids) > room
                token_ids = token_ids[-room:]
            groups[sampling].append(_Ask(number, token_ids, stop, new_tokens))
        self._say_cut(cut, len(requests), "prompts")
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for sampling, asks in groups.items():
                for ask, token_ids in self._answered(asks, sampling):
                    text = whole_text(self.tokenizer, list(token_ids), ask.stop)
                    answers[ask.number] = text
                    self.cache_hook.add_partial("generate_until", requests[ask.number].args, text)
                    bar.update()
        return answers

    def _answered(self, asks: Sequence[_Ask], sampling: Sampling) -> Iterable[tuple[_Ask, Sequence[int]]]:
        model = self.language_model
        names = [f"request {ask.number}" for ask in asks]
        if isinstance(model, EngineModel):
            prompts = [
                Prompt(ask.token_ids, ask.max_new_tokens, ask.stop, self.seed + ask.number, name)
                for ask, name in zip(asks, names, strict=True)
            ]
            order = sorted(range(len(asks)), key=lambda place: len(asks[place].token_ids), reverse=True)
            found = model.engine.generate(
                [prompts[place] for place in order], end_ids=frozenset(self.end_ids), sampling=sampling
            )
            for place, answer in found:
                if answer.error is not None:
                    raise GendistillError(answer.error, where=names[order[place]])
                yield asks[order[place]], answer.token_ids
            return
        if not sampling.greedy:
            raise GendistillError(
                f"a temperature of {sampling.temperature:g} needs our engine, which cannot run this model",
                where="generation_kwargs",
                hint="--gen_kwargs do_sample=False temperature=0",
            )
        wanted = [
            Request(ask.token_ids, ask.max_new_tokens, ask.stop, name)
            for ask, name in zip(asks, names, strict=True)
        ]
        decoding = Decoding({"do_sample": False, "num_beams": 1}, self.end_ids, (*self.end_ids, 0)[0], {})
        for place, answer in model.generate(wanted, decoding):
            yield asks[place], answer.token_ids

    def _rules(self, settings: Any, where: str) -> _Rules:
        """Read generation_kwargs, and refuse those that we would not act upon."""
        if not isinstance(settings, Mapping):
            raise GendistillError(f"generation_kwargs must be a mapping, got {settings!r}", where=where)
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        if unknown := sorted(given.keys() - set(_GENERATION)):
            raise GendistillError(
                f"generation_kwargs that the gendistill model does not know: {', '.join(unknown)}; it knows "
                f"{', '.join(_GENERATION)}",
                where=where,
                hint="leave them out of the task and of --gen_kwargs, or run it with --model hf",
            )
        samples = bool(given["do_sample"]) and float(given.get("temperature", 1.0) or 0.0) > 0
        sampling = (
            Sampling(
                float(given.get("temperature", 1.0)),
                given.get("top_k") or None,
                given.get("top_p"),
                given.get("min_p"),
            )
            if samples
            else Sampling()
        )
        until = tuple(dict.fromkeys(text for text in given["until"] if text))
        return until, sampling, int(given["max_gen_toks"])

    def _say_cut(self, cut: int, of: int, what: str) -> None:
        if cut:
            _LOG.warning(
                "%d of %d %s are longer than the model's %s positions allow: their first tokens are left out",
                *(cut, of, what, f"{self.max_length:,}"),
            )


# what a checkpoint's generation settings may ask for, and lm-eval's hf model would take over
_SHAPES = {
    "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "num_beams",
}  # fmt: skip
_ARGUMENTS = (
    "pretrained", "revision", "dtype", "device", "batch_size", "max_batch_size", "max_length", "max_gen_toks",
    "add_bos_token", "enable_thinking", "seed", "trust_remote_code",
)  # fmt: skip


def _check_arguments(pretrained: str | None, others: Mapping[str, Any], dtype: str) -> None:
    if others:
        name = next(iter(others))
        near = difflib.get_close_matches(name, _ARGUMENTS, n=1)
        raise RecipeError(
            f'the gendistill model has no argument "{printable(name)}"; it has {", ".join(_ARGUMENTS)}',
            where=_WHERE,
            hint=f'did you mean "{near[0]}"?'
            if near
            else "gendistill lm-eval run --model_args pretrained=MODEL",
        )
    if not pretrained:
        raise RecipeError(
            "no model was named", where=_WHERE, hint="gendistill lm-eval run --model_args pretrained=MODEL"
        )
    if dtype not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}", where=f"{_WHERE} dtype")


def _rows(batch_size: int | str | None, most: int | None) -> int | None:
    """Turn lm-eval's batch size into ours: a number, or None for as many as memory allows."""
    if batch_size is None or str(batch_size).startswith(_AUTO):
        return most
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise RecipeError(
            f"the batch size must be auto or a number above 0, got {batch_size!r}",
            where="--batch_size",
            hint="--batch_size auto",
        )
    return int(batch_size)
