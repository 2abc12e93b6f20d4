"""What another package adds to the evaluation, a judge, a protocol, a model, comes out in results and report."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gendistill.config.load import load_recipe
from gendistill.errors import RecipeError, ReportError
from gendistill.report import write_report
from gendistill.report.run_files import read_run
from gendistill.report.verdicts import verdict, warnings
from gendistill.report.write import gap_report
from gendistill_evals import (
    JUDGES,
    PROTOCOLS,
    Judgement,
    LanguageModel,
    Likelihood,
    ProtocolFamily,
    ProtocolRun,
    evaluate_model,
    load_task,
)
from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.model import Generated, ModelSetup, Request
from gendistill_evals.prompts import Prompter, Style
from gendistill_evals.task import Metric

ROWS = [
    {"question": f"{n}?", "gold": word, "options": ["yes", "no"]} for n, word in enumerate(["yes", "no"] * 4)
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Sayer:
    """A model without weights: it prefers one word and says one text, and shouts back if it is shouted at."""

    max_tokens = None
    vocab_size = 256

    def __init__(self, prefers: str, says: str) -> None:
        self.prefers, self.says = prefers, says
        self.generation_defaults = {}
        self.tokenizer = byte_tokenizer()
        self.num_asked = 0

    def identity(self):
        return {"prefers": self.prefers, "says": self.says}

    def setup(self):
        return ModelSetup("paper", "float32", {"sayer": "1"}, None)

    def log_probs(self, pairs):
        for index in reversed(range(len(pairs))):
            self.num_asked += 1
            text = self.tokenizer.decode(pairs[index].continuation).strip()
            yield index, [-0.1 if text == self.prefers else -1.0] * len(pairs[index].continuation)

    def generate(self, requests, decoding):
        for index in reversed(range(len(requests))):
            self.num_asked += 1
            shouted = "!" in self.tokenizer.decode(requests[index].prompt)
            yield index, Generated((1, 2), self.says.upper() if shouted else self.says, ended=True)


@dataclass(frozen=True)
class Shout:
    """Ask every question with an exclamation mark, and count upper case as right."""

    name = "shout"
    label = "!"
    family = ProtocolFamily.GENERATION

    def why_not(self, task):
        return None

    def check(self, model, tokenizer, task, *, limit=None, style=None):
        pass

    def run(self, model, task, *, limit=None, style=None, progress=None):
        prompter, items = Prompter(model.tokenizer), task.items[:limit]
        requests = [Request(prompter.prompt_ids(f"{item.prompt}!"), task.max_new_tokens) for item in items]
        texts = {
            index: answer.text for index, answer in model.generate(requests, greedy_decoding(model, prompter))
        }
        right = [
            text == item.gold.upper()
            for item, text in zip(items, map(texts.get, range(len(items))), strict=True)
        ]
        samples = tuple(
            {"correct": each, "text": texts[index], "extracted": texts[index], "truncated": False, "ended": True,
             "num_tokens": 2}
            for index, each in enumerate(right)
        )  # fmt: skip
        counts = {"extraction_failures": 0, "truncated": 0, "eos_rate": 1.0, "mean_new_tokens": 2.0}
        return ProtocolRun({"value": sum(right) / len(right), "n": len(right), **counts}, samples)


def second_word(item, text):
    """Judge the second word of the answer."""
    words = text.lower().split()
    return Judgement(words[1], words[1] == item.gold) if len(words) > 1 else Judgement(None, correct=False)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(JUDGES, "second_word", second_word)
    per_token = Likelihood("likelihood_mean", "ll/mean", metric=Metric.ACCURACY_PER_TOKEN)
    for protocol in (per_token, Shout()):
        monkeypatch.setitem(PROTOCOLS, protocol.name, protocol)


@pytest.fixture
def task(tmp_path, registered):
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"items": "quiz.jsonl", "max_new_tokens": 4, "kind": "multiple_choice", "prompt": "{question}"}
    (tmp_path / "quiz.yaml").write_text(json.dumps({**settings, "judge": "second_word"}))
    return tmp_path / "quiz.yaml"


def evaluate(run_dir, task, protocols):
    """Score a teacher that says "so yes" and a student that says "yes": by the second word, half and nothing."""
    for role, says in (("teacher", "so yes"), ("student", "yes")):
        model = Sayer("yes", says)
        assert isinstance(model, LanguageModel)
        evaluate_model(
            model,
            tasks=[task],
            out_dir=run_dir / "eval" / role,
            model_name=role,
            role=role,
            protocols=protocols,
        )


def test_a_registered_judge_and_protocol_reach_results_and_report(task, tmp_path):
    run_dir = tmp_path / "run"
    evaluate(run_dir, task, ["likelihood", "likelihood_mean", "generation", "shout"])
    (entry,) = json.loads((run_dir / "eval/student/results.json").read_text())["tasks"]
    names = ("likelihood", "generation", "likelihood_mean", "shout")
    assert [entry[name]["value"] for name in names] == [0.5, 0.0, 0.5, 0.5]
    assert entry["judge"] == "second_word"

    report = gap_report(read_run(run_dir))
    (quiz,) = report.tasks
    assert report.protocols == ("likelihood", "generation", "likelihood_mean", "shout")
    assert {name: gap.value for name, gap in quiz.gap.items() if gap} == {
        "likelihood": 0, "generation": -50, "likelihood_mean": 0, "shout": 50
    }  # fmt: skip
    assert report.leads == {"likelihood": "likelihood", "generation": "generation"}
    assert quiz.hidden.value == -50
    paths = write_report(run_dir)
    assert "teacher ll / gen / ll/mean / !" in paths.markdown.read_text()
    (row,) = csv.DictReader(io.StringIO(paths.csv.read_text()))
    assert (float(row["gap_shout"]), float(row["gap_likelihood_mean"])) == (50, 0)
    page = paths.page.read_text()
    assert "gap !</th>" in page
    assert "<small>shout</small>" in page
    assert (run_dir / "report/gap.png").is_file()


def test_the_hidden_gap_is_of_the_first_of_each_family_that_was_measured(task, tmp_path):
    evaluate(tmp_path / "run", task, ["likelihood_mean", "shout"])
    report = gap_report(read_run(tmp_path / "run"))
    assert report.leads == {"likelihood": "likelihood_mean", "generation": "shout"}
    assert report.protocols == ("likelihood_mean", "shout")
    assert report.tasks[0].hidden.value == 50
    assert warnings(report) == [
        "quiz: likelihood_mean overstates the shout gap by 50.0 pp",
        *(
            f"quiz: by {name} the teacher scores {score}%, not surely above a guess (50.0%), so neither the gap nor "
            "what is kept says anything about the student"
            for name, score in (("likelihood_mean", "50.0"), ("shout", "0.0"))
        ),
    ]
    assert verdict(report).startswith("Writing its answers, the student scores 50.0 points above")


def test_protocols_that_nobody_asked_for_leave_no_trace_in_the_tables(task, tmp_path):
    evaluate(tmp_path / "run", task, None)
    report = gap_report(read_run(tmp_path / "run"))
    assert report.protocols == ("likelihood", "generation")
    assert not any("shout" in line for line in warnings(report))
    assert "shout" not in write_report(tmp_path / "run").page.read_text()


def test_a_report_without_the_package_that_added_a_protocol_leaves_it_out(task, tmp_path, monkeypatch):
    evaluate(tmp_path / "run", task, ["likelihood", "generation", "shout"])
    monkeypatch.delitem(PROTOCOLS, "shout")
    assert gap_report(read_run(tmp_path / "run")).protocols == ("likelihood", "generation")


def test_a_recipe_may_ask_for_a_registered_protocol(registered):
    assert load_recipe("tiny", ["eval.protocols=[shout]"]).eval.protocols == ("shout",)
    with pytest.raises(RecipeError, match='"shut" is not allowed; did you mean "shout"') as caught:
        load_recipe("tiny", ["eval.protocols=[shut]"])
    assert "likelihood_mean" in str(caught.value)


def test_a_recipe_may_not_ask_for_a_protocol_that_nobody_registered():
    with pytest.raises(RecipeError, match="allowed: likelihood, generation"):
        load_recipe("tiny", ["eval.protocols=[shout]"])


def test_finished_parts_of_any_model_are_kept(task, tmp_path):
    model = Sayer("yes", "yes")
    where = {"tasks": [load_task(task)], "out_dir": tmp_path / "out", "model_name": "sayer"}
    first = evaluate_model(model, **where)
    asked = model.num_asked
    assert evaluate_model(model, **where)["tasks"] == first["tasks"]
    assert model.num_asked == asked > 0
    assert (first["device"], first["versions"]) == ("paper", {"sayer": "1"})


def test_models_that_were_asked_in_another_style_are_not_compared(task, tmp_path):
    run_dir = tmp_path / "run"
    for role, style in (("teacher", Style()), ("student", Style(system="Be short."))):
        evaluate_model(
            Sayer("yes", "so yes"), tasks=[task], out_dir=run_dir / "eval" / role, model_name=role, role=role,
            style=style,
        )  # fmt: skip
    with pytest.raises(ReportError, match=r"different settings: style .*'system': None.* / .*Be short"):
        gap_report(read_run(run_dir))
