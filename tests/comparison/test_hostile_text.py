"""Names and texts of models and data are shown as they are written, and steer neither terminal, page nor table."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.console import Console

from gendistill.comparison import compare, load_scores, plots, render_terminal, write_comparison
from gendistill.comparison.tables import render_csv, render_latex, render_markdown
from gendistill.report.tables import latex_text
from gendistill.text import printable

HOSTILE = [
    "[red]x[/red]",
    "[/]",
    "back\\",
    "\x1b[31mred\x1b[0m",
    "nul\x00nul",
    "two\nlines",
    "\u202eright to left",
    "half \ud800 of a pair",
    "<script>alert(1)</script>",
    "</title></style></svg>",
    '" onload="x',
    "{{ 7 * 7 }}{% raw %}",
    "a|b\\|c",
    "=1+1",
    '"quoted", and, commas',
    "$\\frac{",
    "\\input{/etc/passwd} 100% #1 a_b^c~d & e",
    "日本語 🙂",
    "x" * 20_000,
]


@pytest.fixture
def hostile(make_lm_eval, written_row):
    def make(text):
        folders = []
        for name, right in (("a", 30), ("b", 20)):
            rows = [written_row(place, float(place < right)) for place in range(40)]
            for row in rows:
                row["arguments"]["gen_args_0"]["arg_0"] = text
                row |= {"filtered_resps": [text], "filter": text, "target": text}
            ascii_safe = json.loads(json.dumps(rows))
            folders.append(make_lm_eval(name, {"quiz": []}, model_name=f"{text}{name}"))
            path = next(folders[-1].glob("*/samples_*"))
            path.write_text("".join(json.dumps(row) + "\n" for row in ascii_safe))
        return compare(load_scores([str(folder) for folder in folders]))

    return make


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:24])
def test_hostile_text_is_shown_and_obeyed_nowhere(hostile, tmp_path, text):
    comparison = hostile(text)
    shown = printable(text)

    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    render_terminal(comparison, console=console)
    lines = console.file.getvalue()
    assert not {"\x1b", "\x00", "\u202e"} & set(lines)
    assert re.sub(r"\s+", "", shown)[:40] in re.sub(r"\s+", "", lines)

    markdown = render_markdown(comparison)
    assert len(markdown.splitlines()) == 2 + len(comparison.pairs)
    assert "<script" not in markdown
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()}) == 1

    (row,) = csv.DictReader(io.StringIO(render_csv(comparison), newline=""))
    assert row["first"] == f"{text}a"

    latex = render_latex(comparison)
    assert len([line for line in latex.splitlines() if line.endswith(r"\\")]) == 1 + len(comparison.pairs)
    assert "\\input" not in latex

    paths = write_comparison(comparison, tmp_path / "out", command=f"compare {text}", gates=[text])
    page = paths.page.read_text()
    assert "<script" not in page
    assert page.count("</title>") == page.count("</style>") == page.count("</svg>") == 1
    assert ' onload="' not in page
    assert "{{ 7 * 7 }}" in page or "{{" not in text
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert json.loads(paths.json.read_text())["models"][0].endswith("a")


@pytest.mark.parametrize("text", ["$\\frac{", "$x$", "\x1b[31m\x00", "日本語 🙂 \ud800"])
def test_names_are_no_formulas_in_figures(hostile, text, recwarn):
    drawings = plots.plot_forest(hostile(text))
    assert drawings["pdf"].startswith(b"%PDF")
    assert b"<svg" in drawings["svg"]
    assert [str(one.message) for one in recwarn if "Glyph" in str(one.message)] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("50% of a_b & c#1", r"50\% of a\_b \& c\#1"),
        ("\\cmd{x}$y$", r"\textbackslash{}cmd\{x\}\$y\$"),
        (
            "a~b^c <d> |e|",
            r"a\textasciitilde{}b\textasciicircum{}c \textless{}d\textgreater{} \textbar{}e\textbar{}",
        ),
    ],
)
def test_latex_shows_what_it_would_obey(text, shown):
    assert latex_text(text) == shown
