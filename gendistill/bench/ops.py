"""Check and time our KDA ops, case by case, beside those of a peer.

Nothing is timed unless every check of ours passes. A peer is called at full size first: it tunes its kernels on the
first sizes that it meets and keeps the choice for all lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape

from gendistill.bench import cases as sizes
from gendistill.bench import measure
from gendistill.bench.cases import BARS, GATES, Case, DecodeCase
from gendistill.bench.cold import Who, cold_and_warm
from gendistill.bench.inputs import draw_decode, draw_sequence
from gendistill.bench.measure import Expected, Step, Timing, attempt
from gendistill.bench.peers import Contestant, Ours
from gendistill.bench.rows import Check, Measurement, check_table, measurement_table
from gendistill.errors import GendistillError


@dataclass(slots=True, kw_only=True)
class Bench:
    """A run of the cases, and what was measured.

    Attributes:
        cases, decode_cases, gates: What to run, in this order; decode steps follow the first gate.
        dtype, device: Of the inputs.
        peer: None measures ours alone.
        ours: Our ops.
        budget_s: No case starts later than this.
        cold: Whose first calls to time, after the decode steps.
        breakdown: Also list the time of each of our kernels.
        console: Where to print.
        save: Called with everything measured so far, after every case.
    """

    cases: Sequence[Case]
    decode_cases: Sequence[DecodeCase]
    gates: Sequence[str] = GATES
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    peer: Contestant | None = None
    ours: Contestant = field(default_factory=Ours)
    budget_s: float | None = None
    cold: Sequence[Who] = ()
    breakdown: bool = False
    console: Console = field(default_factory=lambda: Console(highlight=False))
    save: Callable[[Sequence[Measurement]], None] = lambda found: None
    found: list[Measurement] = field(default_factory=list)
    _expected: dict[tuple, Expected] = field(default_factory=dict)
    _checks: dict[tuple, Check] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @property
    def peer_label(self) -> str | None:
        """What tables call the peer."""
        return self.peer.label if self.peer else None

    def check_ours(self) -> bool:
        """Print how far ours is from float64 in every geometry; returns whether all of it is under the bars."""
        for gate in self.gates:
            for case in self.cases:
                if (key := (*case.geometry, gate)) not in self._checks:
                    self._say(f"checking {case.name} {gate}")
                    small = draw_sequence(
                        case.small(), gate, device=self.device, dtype=self.dtype, with_state=True
                    )
                    self._check(key, case.name, gate, measure.expect_sequence(small))
        for case in self.decode_cases:
            if case.geometry not in self._checks:
                x = draw_decode(replace(case, batch=2), device=self.device, dtype=self.dtype)
                self._check(case.geometry, case.name, "bounded", measure.expect_decode(x))
        checks = list(self._checks.values())
        self.console.print(check_table(checks, self.peer_label))
        return all(check.passed for check in checks)

    def _check(self, key: tuple, name: str, gate: str, expected: Expected) -> None:
        self._expected[key] = expected
        self._checks[key] = Check(name, gate, *measure.errors_of(self.ours, expected), peer={})

    def run(self) -> int:
        """Check, then time; returns the exit code."""
        if not self.check_ours():
            self.console.print("[bold red]RED[/]: our ops are not right here, so nothing is timed")
            return 1
        work = [lambda case=case: self._time_case(case, self.gates[0]) for case in self.cases]
        work += [lambda case=case: self._time_decode(case) for case in self.decode_cases]
        work += [self._time_cold] if self.cold else []
        work += [
            lambda case=case, gate=gate: self._time_case(case, gate)
            for gate in self.gates[1:]
            for case in self.cases
        ]
        for number, one in enumerate(work, 1):
            spent = time.monotonic() - self._start
            if self.budget_s is not None and spent > self.budget_s:
                self.console.print(
                    f"the budget of {self.budget_s:g} s is spent: {len(work) - number + 1} of {len(work)} left out"
                )
                break
            self._say(f"{number} of {len(work)}")
            found = one()
            self.found += found
            self.console.print(measurement_table(found, self.peer_label))
            self.save(self.found)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        for key in self._expected:
            self.found += self._checks[key].measurements()
        self.save(self.found)
        return 0

    def _time_case(self, case: Case, gate: str) -> list[Measurement]:
        self._say(f"{case.name} {gate}")
        x = draw_sequence(case, gate, device=self.device, dtype=self.dtype)
        who, notes = self._ready(lambda one: (measure.train(one, x)(), measure.forward(one, x)()))
        found = self._compare((*case.geometry, gate), peer="peer" in who)
        for quantity, make in ((sizes.FORWARD, measure.forward), (sizes.TRAIN, measure.train)):
            steps = {name: make(one, x) for name, one in who.items()}
            about = {"case": case.name, "gate": gate, "notes": notes}
            eager = measure.time_rounds(steps)
            found += self._times(eager, quantity, "ms", **about)
            if quantity == sizes.TRAIN:
                peaks = {name: measure.peak_extra_mib(step) for name, step in steps.items()}
                found.append(self._values(peaks, f"{quantity}, {sizes.MEMORY}", "MiB", **about))
            launches = {name: measure.count_launches(step) for name, step in steps.items()}
            found.append(self._values(launches, f"{quantity}, {sizes.LAUNCHES}", "launches", **about))
            if self.breakdown:
                for name, time_ms in measure.kernel_times(steps["ours"]).items():
                    where = f"{quantity}, {name} on the device"
                    found.append(self._values({"ours": time_ms}, where, "ms", **{**about, "notes": []}))
            graphs, failures = self._graphs(steps)
            replayed = measure.time_rounds(graphs)
            found += self._times(
                replayed, f"{quantity}, CUDA graph", "ms", **{**about, "notes": notes + failures}
            )
            least = case.least_bytes(backward=quantity == sizes.TRAIN, item_size=self.dtype.itemsize)
            rates = {name: least / time.median / 1e6 for name, time in {**eager, **replayed}.items()}
            found.append(
                self._values(rates, f"{quantity}, {sizes.BANDWIDTH}", "GB/s", better="higher", **about)
            )
            del graphs
        return found

    def _time_decode(self, case: DecodeCase) -> list[Measurement]:
        self._say(case.name)
        x = draw_decode(case, device=self.device, dtype=self.dtype)
        number = measure.rotations(case.state_bytes)
        who, notes = self._ready(lambda one: measure.rotating_steps(one, x, 2)())
        found = self._compare(case.geometry, peer="peer" in who)
        steps = {name: measure.rotating_steps(one, x, number) for name, one in who.items()}
        launches = {
            name: measure.count_launches(measure.rotating_steps(one, x, 1)) for name, one in who.items()
        }
        graphs, failures = self._graphs(steps)
        scale = 1000 / number
        times = {
            name: Timing(*(part * scale for part in timing))
            for name, timing in measure.time_rounds(graphs).items()
        }
        notes = [*notes, *failures, f"CUDA graph of {number} steps on states of their own"]
        about = {"case": case.name, "gate": None, "notes": notes}
        found += self._times(times, sizes.STEP, "us", **about)
        rates = {name: 2 * case.state_bytes / time.median / 1e3 for name, time in times.items()}
        found.append(
            self._values(rates, f"{sizes.STEP}, bandwidth of the state", "GB/s", better="higher", **about)
        )
        found.append(self._values(launches, f"{sizes.STEP}, {sizes.LAUNCHES}", "launches", **about))
        return found

    def _time_cold(self) -> list[Measurement]:
        seconds: dict[Who, tuple[float, float]] = {}
        for who in self.cold:
            self._say(f"first call of {self._name(who)}, in processes of their own")
            try:
                seconds[who] = cold_and_warm(who)
            except GendistillError as error:
                self._say(f"not measured: {error.message}")
        about = {"case": "cold start", "gate": None}
        notes = [f"first forward and backward pass of {sizes.COLD_CASE.name}, after imports"]
        return [
            self._values({who: pair[index] for who, pair in seconds.items()}, name, "s", notes=notes, **about)
            for index, name in enumerate(sizes.COLD_QUANTITIES)
        ]

    def _ready(self, first: Callable[[Contestant], object]) -> tuple[dict[str, Contestant], list[str]]:
        """Call everybody once, so that all is compiled and tuned; leaves out a peer that cannot run."""
        first(self.ours)
        who: dict[str, Contestant] = {"ours": self.ours}
        if self.peer is None:
            return who, []
        start = time.monotonic()
        reason = attempt(lambda: first(self.peer))[1]  # pyright: ignore[reportArgumentType]
        if reason is not None:
            self._say(f"{self.peer.label} is not measured: {reason}")
            return who, [f"{self.peer.label} not measured: {reason}"]
        self._synchronize()
        self._say(f"{self.peer.label}: first call {time.monotonic() - start:.1f} s")
        return {**who, "peer": self.peer}, []

    def _compare(self, key: tuple, *, peer: bool) -> list[Measurement]:
        """Check the peer where its geometry comes up first, and return all errors of that geometry."""
        expected = self._expected.pop(key, None)
        if expected is None:
            return []
        check = self._checks[key]
        if peer and self.peer is not None:
            result, reason = attempt(lambda: measure.errors_of(self.peer, expected))  # pyright: ignore
            if reason is not None:
                self._say(f"{self.peer.label} is not checked: {reason}")
            else:
                check = replace(check, peer=result[0], peer_same=result[1])
            self.console.print(check_table([check], self.peer_label))
        return check.measurements()

    def _graphs(self, steps: Mapping[str, Step]) -> tuple[dict[str, Step], list[str]]:
        """Capture steps; returns what replays them, and why some cannot be captured."""
        graphs, reasons = measure.capture_all(steps)
        failures = [f"no CUDA graph of {self._name(name)}: {reason}" for name, reason in reasons.items()]
        for failure in failures:
            self._say(failure)
        return graphs, failures

    def _times(
        self, times: Mapping[str, Timing], quantity: str, unit: str, *, notes, **about
    ) -> list[Measurement]:
        spreads = [
            f"{self._name(name)}: rounds {time.low:.4g} to {time.high:.4g}, 20-80% {time.early:.4g} to {time.late:.4g}"
            for name, time in times.items()
        ]
        medians = {name: time.median for name, time in times.items()}
        found = [self._values(medians, quantity, unit, notes=[*spreads, *notes], **about)]
        faster = f"{quantity}, {sizes.SPEED}"
        if (about["case"], faster) in BARS and len(medians) == 2:
            speed = {"ours": medians["peer"] / medians["ours"]}
            found.append(self._values(speed, faster, "", notes=[], better="higher", **about))
        return found

    def _values(
        self,
        values: Mapping[str, float | None],
        quantity: str,
        unit: str,
        *,
        case: str,
        gate: str | None,
        notes: Sequence[str],
        better: Literal["lower", "higher"] = "lower",
    ) -> Measurement:
        key = sizes.MEMORY if quantity.endswith(sizes.MEMORY) else quantity
        return Measurement(
            case=case,
            gate=gate,
            quantity=quantity,
            unit=unit,
            ours=values.get("ours"),
            peer=values.get("peer"),
            bar=BARS.get((case, key)),
            better=better,
            note="; ".join(notes) or None,
        )

    def _name(self, who: str) -> str:
        return (self.peer_label if who == "peer" else None) or who

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self._start:6.1f} s[/]  {escape(text)}", soft_wrap=True)
