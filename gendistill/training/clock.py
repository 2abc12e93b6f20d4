"""The time that the parts of a step take, in the device's own time, without waiting for the device inside a step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Part = Literal["teacher", "student", "mixers", "loss", "optimizer", "step"]
PARTS: tuple[Part, ...] = ("teacher", "mixers", "student", "loss", "optimizer")
# a part, and the marks at its ends
Span = tuple[Part, Any, Any]
# these contain others: what is left of them is reported
_INSIDE: dict[Part, tuple[Part, ...]] = {
    "student": ("mixers", "loss"),
    "step": ("teacher", "student", "optimizer"),
}


class StepClock:
    """A clock for the parts of a step. While it is stopped, nothing is noted.

    On a GPU a mark is an event in its queue, elsewhere the host's time; marks are read where a line is logged, and the
    device is waited for anyway. Of a mixer, hooks see the forward pass, and the backward pass from the gradient of what
    came out to the gradient of what went in; where no gradient goes in, as in alignment, to the beginning of the next
    block's. The loss is what follows the decoder, and the backward pass up to the decoder's gradient. A mixer that is
    not called as a module counts as ``student``.

    Args:
        device: Where steps are computed.

    Attributes:
        running: Whether the step that is being taken is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running = self._discarded = False
        self._spans: list[Span] = []
        self._mixer_from: Any = None
        # recomputed, it has its block's activations behind it: to hold it would be to hold these
        self._mixer_out: weakref.ref[Tensor] | None = None
        self._decoder_end: Any = None
        # a backward pass whose end is still to come
        self._open: tuple[Part, Any] | None = None

    @contextmanager
    def step(self, decoder: nn.Module, blocks: Sequence[nn.Module], *, measured: bool) -> Iterator[None]:
        """Note the time of the step that is taken inside, if it is to be measured; inside another, that one does.

        Args:
            decoder: Of the student.
            blocks: Its converted layers, whose ``self_attn`` is the mixer.
            measured: Whether to note anything.
        """
        if self.running:
            yield
            return
        self._spans.clear()
        if not measured:
            yield
            return
        self.running, self._discarded = True, False
        handles = [decoder.register_forward_hook(self._after_decoder)]
        for block in blocks:
            mixer: Any = block.self_attn
            handles += [
                mixer.register_forward_pre_hook(self._before_mixer, with_kwargs=True),
                mixer.register_forward_hook(self._after_mixer),
                block.register_forward_hook(self._after_block),
            ]
        try:
            with self.part("step"):
                yield
        finally:
            self.running = False
            if self._discarded:
                self._spans.clear()
            self._forget_beginnings()
            for handle in handles:
                handle.remove()

    @contextmanager
    def part(self, name: Part, *, backward: bool = False) -> Iterator[None]:
        """Note how long the device takes for what is asked of it inside."""
        if not self.running:
            yield
            return
        start = self._mark()
        if backward and self._decoder_end is not None:
            self._open, self._decoder_end = ("loss", start), None
        yield
        if not backward and name == "student" and self._decoder_end is not None:
            self._spans.append(("loss", self._decoder_end, self._mark()))
        self._close()
        self._spans.append((name, start, self._mark()))

    def read(self) -> dict[str, float]:
        """Wait for the end of the measured step; return each part's share of it, and its ``seconds``.

        Returns: ``teacher``, ``mixers``, ``student`` (its passes without mixers and loss), ``loss``, ``optimizer`` and
            ``other`` (data, sums over processes, the host), as far as they occurred; nothing if the last step was not
            measured.
        """
        spans, self._spans = self._spans, []
        if not spans or spans[-1][0] != "step":
            return {}
        if self.device.type == "cuda":
            spans[-1][2].synchronize()
        seconds: dict[Part, float] = {}
        for name, start, end in spans:
            seconds[name] = seconds.get(name, 0.0) + _between(start, end)
        alone = {
            name: max(value - sum(seconds.get(part, 0.0) for part in _INSIDE.get(name, ())), 0.0)
            for name, value in seconds.items()
        }
        whole = max(seconds["step"], 1e-9)
        shares = {name: alone[name] / whole for name in PARTS if name in alone}
        return {**shares, "other": alone["step"] / whole, "seconds": seconds["step"]}

    @contextmanager
    def aside(self) -> Iterator[list[Span]]:
        """Note what is asked of the device inside in the list that this yields, and not in the step's."""
        spans, self._spans = self._spans, []
        try:
            yield self._spans
        finally:
            self._spans = spans
            # after an error, the beginnings of spans that have no end
            self._forget_beginnings()

    def add(self, spans: Sequence[Span]) -> None:
        """Count spans to the step: those of a graph that is launched again, which makes their marks anew."""
        self._spans += spans

    def discard(self) -> None:
        """Have the step that is being taken count as not measured."""
        self._discarded = True

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        # in a graph that is being captured, a mark that every launch of the graph makes anew
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def _forget_beginnings(self) -> None:
        self._mixer_out = self._open = self._decoder_end = None

    def _begin(self, name: Part) -> None:
        """Begin a part's backward pass; it ends the one before."""
        if self.running:
            mark = self._mark()
            self._close(mark)
            self._open = (name, mark)

    def _close(self, end: Any = None) -> None:
        """End the backward pass that is open."""
        if self.running and self._open is not None:
            name, start = self._open
            self._spans.append((name, start, end or self._mark()))
            self._open = None

    def _before_mixer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._on_gradient(given, self._close)
            self._mixer_from = self._mark()

    def _after_mixer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.running:
            self._spans.append(("mixers", self._mixer_from, self._mark()))
            self._mixer_out = weakref.ref(output[0])
            self._on_gradient(output[0], lambda: self._begin("mixers"))

    def _after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        # a loss may run the mixer in the place of the block
        if self.running and not (self._mixer_out and out is self._mixer_out()):
            self._on_gradient(out, self._close)

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.running:
            self._decoder_end = self._mark()
            self._on_gradient(output.last_hidden_state, self._close)

    def _on_gradient(self, tensor: Any, act: Any) -> None:
        """Do something once the gradient of a tensor is known; the gradient itself is left as it is."""
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            tensor.register_hook(lambda _gradient: act())


def _between(start: Any, end: Any) -> float:
    """Seconds between two marks."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
