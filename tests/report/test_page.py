"""The page is one file, shows everything the run measured, invents nothing and runs nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from gendistill.errors import OutputError, ReportError
from gendistill.report import write_report
from gendistill.report.html import format_bytes, gold_text, render_page, worst_samples
from gendistill.report.run_files import read_run
from gendistill.report.write import gap_report

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def page_without_figures(run_dir):
    run = read_run(run_dir)
    return render_page(run, gap_report(run), {})


class Tags(HTMLParser):
    """Collect every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_page_is_self_contained(make_run):
    page = write_report(make_run()).page.read_text()
    tags = Tags(page).found
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    sources = [attributes["src"] for _, attributes in tags if "src" in attributes]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "@import" not in page
    assert "url(" not in page


def test_the_letters_of_the_placement_are_those_that_it_shows(make_run, edit_json):
    run_dir = make_run()
    edit_json(
        run_dir / "manifest.json", lambda content: content["student"].update(placement=["sink", "kda"] * 2)
    )
    page = page_without_figures(run_dir)
    assert "W softmax attention to the last and the first tokens, K linear attention" in page
    assert "within a window" not in page


def test_page_shows_what_was_measured(make_run):
    page = page_without_figures(make_run())
    for shown in (
        "32.5 points below its teacher",
        "likelihood hides 40.0 pp",
        "org/teacher",
        "2 kda, 2 full",
        "0.80",
        "20% of it left",
        "What is the capital of France?",
        "Rome &amp; Rome.",
        '<span class="bad">repetition <b>50%',
        "is 0.25 for the teacher's answers and 0.75 for the student's",
        "mixer_output",
        "16.0 MiB",
        "9 of 9 items",
        "gendistill run demo",
        "2.13.0",
    ):
        assert shown in page, shown
    assert "not measured" not in page.replace("is not measured.", "")


def test_text_from_models_and_data_never_becomes_markup(make_run, edit_json):
    run_dir = make_run()
    for role in ("teacher", "student"):
        folder = run_dir / "eval" / role
        for name in ("samples.jsonl", "transcripts.jsonl"):
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for row in rows:
                row.update({key: ATTACK for key in ("prompt", "question", "answer") if key in row})
                if row.get("generation"):
                    row["generation"].update(text=ATTACK, extracted=ATTACK)
                if row.get("options"):
                    row["options"] = [ATTACK, ATTACK]
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit_json(run_dir / "manifest.json", lambda content: content.update(command=ATTACK, name=ATTACK))
    page = page_without_figures(run_dir)
    assert page.count("&lt;script&gt;") > 20
    for tag, attributes in Tags(page).found:
        assert tag != "script"
        assert "onerror" not in attributes


@pytest.mark.parametrize(
    ("missing", "phrase"),
    [
        ("eval", "task scores of teacher and student: not measured"),
        ("eval/student", "student: not measured"),
        ("eval/teacher/transcripts.jsonl", "answer: not measured"),
        ("stages", "training: not measured"),
        ("manifest.json", "placement: not measured"),
    ],
)
def test_missing_parts_are_said_to_be_missing(make_run, missing, phrase):
    run_dir = make_run()
    path = run_dir / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert phrase in page_without_figures(run_dir)


def test_a_run_that_has_only_started_has_a_page(make_run):
    run_dir = make_run(teacher=None, student=None)
    for name in ("stages", "eval", "convert"):
        shutil.rmtree(run_dir / name)
    (run_dir / "manifest.json").write_text("{}")
    paths = write_report(run_dir)
    assert paths.figures == ()
    assert paths.page.read_text().count("not measured.") >= 9


def test_an_unfinished_stage_is_shown_as_such(make_run):
    run_dir = make_run()
    (run_dir / "stages/distill/result.json").unlink()
    with (run_dir / "stages/distill/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 11, "lo')
    page = page_without_figures(run_dir)
    assert "unfinished after 10 logged steps" in page
    assert [name for name, _ in read_run(run_dir).heldout] == ["conversion", "project"]


def test_equal_runs_give_equal_reports(make_run):
    run_dir = make_run()
    first = {path.name: path.read_bytes() for path in write_report(run_dir).page.parent.iterdir()}
    second = {path.name: path.read_bytes() for path in write_report(run_dir).page.parent.iterdir()}
    assert first == second
    assert {
        "index.html",
        "gap.json",
        "table.md",
        "table.csv",
        "table.tex",
        "gap.png",
        "gap.svg",
    } <= first.keys()
    pngs = [content for name, content in first.items() if name.endswith(".png")]
    assert len(pngs) == 6
    for ending, start in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        curves = [content for name, content in first.items() if name.endswith(ending)]
        assert len(curves) == 6
        assert all(content.startswith(start) for content in curves)
    assert all(content.startswith(b"\x89PNG") for content in pngs)


def test_hidden_losses_come_first(make_run):
    """Items 8 to 11 are right by likelihood, 12 to 15 are not; the student writes all eight wrongly."""
    run = read_run(make_run())
    shown, num_lost = worst_samples(run, gap_report(run).leads)
    assert num_lost == 9
    assert [pair["hidden"] for pair in shown] == [True] * 4 + [False] * 5
    assert [pair["id"] for pair in shown[:4]] == ["008", "009", "010", "011"]


def test_a_prompt_of_turns_is_shown_with_who_speaks(make_run):
    run_dir = make_run()
    for role in ("teacher", "student"):
        path = run_dir / f"eval/{role}/samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["prompt"] = [
                {"role": "system", "content": "Be <b>short</b>."},
                {"role": "user", "content": "A?"},
            ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<pre>system: Be &lt;b&gt;short&lt;/b&gt;.\n\nuser: A?</pre>" in page_without_figures(run_dir)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"gold": 1, "options": ["a", "b"]}, "b"),
        ({"gold": "b", "options": ["a", "b"]}, "b"),
        ({"gold": 42, "options": None}, "42"),
        ({"gold": 7, "options": ["a", "b"]}, "7"),
    ],
)
def test_gold_is_an_option_only_if_it_is_an_index(row, shown):
    assert gold_text(row) == shown


def test_bytes_use_binary_units():
    assert [format_bytes(size) for size in (512, 1536, 2**20, 3 * 2**30)] == [
        "512 B",
        "1.5 KiB",
        "1.0 MiB",
        "3.0 GiB",
    ]


@pytest.mark.parametrize("name", ["manifest.json", "eval/teacher/samples.jsonl"])
def test_a_corrupt_file_is_named(make_run, name):
    run_dir = make_run()
    (run_dir / name).write_text('{"half": \n')
    with pytest.raises(ReportError) as caught:
        write_report(run_dir)
    assert (caught.value.where or "").startswith(str(run_dir / name))


def test_another_folder_is_no_run_folder(tmp_path):
    with pytest.raises(ReportError, match="not a run folder") as caught:
        write_report(tmp_path)
    assert "such as runs/" in (caught.value.hint or "")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ReportError, match="not a run folder") as caught:
        write_report(tmp_path)
    assert "gendistill compare" in (caught.value.hint or "")


def test_an_unwritable_report_folder_is_named(make_run):
    run_dir = make_run()
    (run_dir / "report").write_text("a file where the folder belongs")
    with pytest.raises(OutputError, match="report"):
        write_report(run_dir)


def test_reporting_imports_no_torch_and_tables_no_matplotlib():
    code = (
        "import sys, gendistill.report; early = 'matplotlib' in sys.modules;"
        "import gendistill.report.html, gendistill.report.plots, gendistill.results.table;"
        "print(early, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_figures_for_a_paper_embed_their_letters_as_type(make_run):
    """Publishers refuse Type 3, the letters drawn as shapes."""
    pdf = write_report(make_run()).page.with_name("gap.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
