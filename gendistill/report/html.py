"""The page: one self-contained HTML file, readable on a phone, without scripts or anything to fetch."""

from __future__ import annotations

import base64
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from gendistill.anatomy.mixers import MIXERS
from gendistill.report import tables, verdicts
from gendistill.report.diagnostics import answer_rows, length_tables, order_rows, subject_tables
from gendistill.report.gap import GapReport
from gendistill.report.plots import Drawing
from gendistill.report.run_files import ROLES, RunFiles
from gendistill.types import short_count
from gendistill_evals import PROTOCOLS, ProtocolFamily

REPETITION_LIMIT = 0.2
_DOES = {
    ProtocolFamily.LIKELIHOOD: "ranks the options by log-likelihood",
    ProtocolFamily.GENERATION: "lets the model write and reads its answer",
}
_SHOWN_SAMPLES = 10


def render_page(run: RunFiles, report: GapReport, figures: Mapping[str, Drawing]) -> str:
    """Render the page.

    Args:
        run: The run's files.
        report: Its gap report.
        figures: As ``plot_run`` draws them.
    Returns: HTML. Every text that a model or a dataset produced is escaped.
    """
    samples, num_lost = worst_samples(run, report.leads)
    shown = tables.main_protocols(report)
    return (
        page_environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            report=report,
            figures=figures,
            headers=tables.headers(shown),
            table=tables.cell_rows(report, shown),
            legend=legend(report, shown),
            protocol_headers=tables.PROTOCOL_HEADERS,
            protocol_table=tables.protocol_rows(report),
            verdict=verdicts.verdict_sentences(report),
            warnings=verdicts.warnings(report),
            remarks=verdicts.stage_remarks(run),
            cards=summary_cards(run, report),
            layers=placement_layers(run),
            mixers=MIXERS,
            heldout=heldout_rows(run),
            watched=watched_stages(run),
            transcripts=paired_transcripts(run),
            answers=transcript_summary(run),
            repetition_limit=REPETITION_LIMIT,
            samples=samples,
            num_lost=num_lost,
            orders=order_rows(run),
            answered=answer_rows(run, report),
            subjects=subject_tables(run, report),
            lengths=length_tables(run),
        )
    )


@functools.cache
def page_environment(package: str = "gendistill.report") -> jinja2.Environment:
    """Set up the templates of a package: everything is escaped, and nothing undefined is shown as empty."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = lambda drawing: (
        "data:image/png;base64," + base64.b64encode(drawing.png).decode()
    )
    environment.filters["minus"] = lambda text: re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)
    environment.filters["bytes"] = format_bytes
    environment.filters["short"] = short_count
    environment.filters["exp"] = perplexity
    environment.filters["signed"] = tables.signed
    return environment


def legend(report: GapReport, protocols: Sequence[str]) -> str:
    """Say what the heads of the table mean."""
    does = "; ".join(f"{PROTOCOLS[name].label} {_DOES[PROTOCOLS[name].family]}" for name in protocols)
    ranked, written = (PROTOCOLS[report.leads[family]].label for family in ProtocolFamily)
    return (
        f"{does}. Same items, scores in percent. Gap is student minus teacher in percentage points, hidden gap is "
        f"{written} gap minus {ranked} gap"
    )


def summary_cards(run: RunFiles, report: GapReport) -> list[tuple[str, str, str]]:
    """List the headline numbers as label, value and context; those not measured are left out."""
    cards = []
    written = report.leads[ProtocolFamily.GENERATION]
    for label, gap in ((f"{written} gap", report.mean_gap(written)), ("hidden gap", report.mean_hidden)):
        if gap:
            interval = f"95% interval {tables.signed(gap.low)} to {tables.signed(gap.high)}"
            cards.append((label, f"{tables.signed(gap.value)} pp", interval))
    if kept := report.kept.get(written):
        above = f"; above chance {kept.above_chance.value:.0f}%" if kept.above_chance else ""
        interval = f"95% interval {kept.plain.low:.0f}% to {kept.plain.high:.0f}%"
        if drawn := kept.plain_bootstrap:
            interval += f", by bootstrap {drawn.low:.0f}% to {drawn.high:.0f}%"
        interval += above
        cards.append(("kept", f"{kept.plain.value:.0f}%", interval))
    elif any(report.leads[ProtocolFamily.GENERATION] in task.at_chance for task in report.tasks):
        cards.append(("kept", tables.NOT_MEASURED, "the teacher is not surely above chance"))
    if len(run.heldout) > 1:
        first, last = run.heldout[0][1]["kl"], run.heldout[-1][1]["kl"]
        share = f", {last / first:.0%} of it left" if first > 0 else ""
        cards.append(("held-out KL", f"{last:.2f}", f"nats per token; {first:.2f} after conversion{share}"))
    if run.heldout:
        student, teacher = (perplexity(run.heldout[-1][1][f"{role}_ce"]) for role in ("student", "teacher"))
        cards.append(("perplexity", f"× {student / teacher:.2f}", f"{student:.4g} against {teacher:.4g}"))  # noqa: RUF001
    cache = run.manifest.get("cache_bytes")
    if cache:
        longest = cache[-1]
        share = longest["student"] / longest["teacher"]
        cards.append((f"cache at {longest['tokens']:,} tokens", f"{share:.0%}", "of the teacher's memory"))
    return cards


def placement_layers(run: RunFiles) -> list[dict[str, Any]]:
    """List the layers with their mixer and, for converted ones, how close its output was before training."""
    if run.placement is None:
        return []
    probed = {layer["layer"]: layer for layer in (run.probe or {}).get("layers") or []}
    return [
        {"layer": index, "kind": kind, "cosine": probed.get(index, {}).get("cosine")}
        for index, kind in enumerate(run.placement.kinds)
    ]


def paired_transcripts(run: RunFiles) -> list[dict[str, Any]]:
    """Put the two answers to each open question side by side."""
    by_role = {role: {row["id"]: row for row in run.transcripts[role]} for role in ROLES}
    ids = list(dict.fromkeys(item for found in by_role.values() for item in found))
    return [{role: by_role[role].get(item) for role in ROLES} for item in ids]


def transcript_summary(run: RunFiles) -> dict[str, float] | None:
    """Average teacher NLL over the questions that both models answered, and the student's worst repetition."""
    pairs = [pair for pair in paired_transcripts(run) if pair["teacher"] and pair["student"]]
    scored = [
        pair for pair in pairs if None not in (pair["teacher"]["teacher_nll"], pair["student"]["teacher_nll"])
    ]
    if not scored:
        return None
    nll = {role: math.fsum(pair[role]["teacher_nll"] for pair in scored) / len(scored) for role in ROLES}
    return {**nll, "repetition": max(pair["student"]["repeated_4gram_share"] for pair in pairs)}


def watched_stages(run: RunFiles) -> list[dict[str, Any]]:
    """List the stages that were looked at while they trained: shares of a step, what went wrong, the last answers."""
    found = []
    for stage in run.stages:
        measured = [row for row in stage.metrics if row.get("shares")]
        last = measured[-1] if measured else {}
        facts = [(name, f"{share:.0%}") for name, share in last.get("shares", {}).items()]
        if "mfu" in last.get("speed", {}):
            facts.insert(0, ("MFU", f"{last['speed']['mfu']:.0%}"))
        result = stage.result or {}
        went_wrong = []
        if result.get("skipped"):
            went_wrong.append(f"{result['skipped']:,} steps were not finite and changed nothing")
        if result.get("rewinds"):
            went_wrong.append(f"went back to a checkpoint {len(result['rewinds'])} times")
        at = stage.answers[-1]["step"] if stage.answers else None
        answers = [row for row in stage.answers if row["step"] == at][:_SHOWN_SAMPLES]
        if facts or went_wrong or answers:
            found.append(
                {"name": stage.name, "facts": facts, "wrong": went_wrong, "answers": answers, "step": at}
            )
    return found


def worst_samples(run: RunFiles, leads: Mapping[ProtocolFamily, str]) -> tuple[list[dict[str, Any]], int]:
    """Pick items whose generated answer the teacher gets right and the student does not.

    Args:
        run: The run's files.
        leads: The protocols that the hidden gap compares.
    Returns: The first ten, those that likelihood counts as right first, and how many such items there are.
    """
    ranked, written = leads[ProtocolFamily.LIKELIHOOD], leads[ProtocolFamily.GENERATION]
    teacher = {(row["task"], row["id"]): row for row in run.samples["teacher"]}
    lost = []
    for row in run.samples["student"]:
        right = teacher.get((row["task"], row["id"]))
        if right and _correct(right, written) and _correct(row, written) is False:
            lost.append(
                {
                    "task": row["task"],
                    "id": row["id"],
                    "prompt": prompt_text(row["prompt"]),
                    "gold": gold_text(row),
                    "answers": {"teacher": right[written], "student": row[written]},
                    "hidden": bool(_correct(row, ranked)),
                }
            )
    lost.sort(key=lambda pair: not pair["hidden"])
    return lost[:_SHOWN_SAMPLES], len(lost)


def _correct(row: Mapping[str, Any], protocol: str) -> bool | None:
    return bool(row[protocol]["correct"]) if row.get(protocol) else None


def prompt_text(prompt: Any) -> str:
    """Write a prompt for reading: a text as it is, turns with who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def gold_text(row: Mapping[str, Any]) -> str:
    """Write the reference answer: an option's text where gold is its index."""
    gold, options = row["gold"], row.get("options")
    if options and isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(options):
        return str(options[gold])
    return str(gold)


def heldout_rows(run: RunFiles) -> list[dict[str, Any]]:
    """List held-out scores after conversion and each stage, with what they are as perplexities."""
    return [
        {
            "name": name,
            **scores,
            "perplexity": perplexity(scores["student_ce"]),
            "teacher_perplexity": perplexity(scores["teacher_ce"]),
            "worse": index > 0 and scores["kl"] > run.heldout[index - 1][1]["kl"],
        }
        for index, (name, scores) in enumerate(run.heldout)
    ]


def perplexity(cross_entropy: float) -> float:
    """Turn nats per token into the number of equally likely tokens that would surprise as much."""
    return math.exp(min(cross_entropy, 700.0))


def format_bytes(count: int) -> str:
    """Write a number of bytes in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
