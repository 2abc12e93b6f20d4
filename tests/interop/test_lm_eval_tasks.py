"""lm-eval's tasks in our evaluations: item by item what lm-eval itself says, and refusals by name."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer
from gendistill_evals import EvalError, evaluate_model, load_task, load_tasks
from gendistill_evals.forms import reordered
from gendistill_evals.lm_eval_file import functions_of, is_lm_eval_file, read_lm_eval_file
from gendistill_evals.lm_eval_tasks import is_lm_eval_task, load_lm_eval_tasks

MEAN = {"aggregation": "mean", "higher_is_better": True}


def theirs(folder, path, *, chat=False, **settings):
    model = load_causal_lm(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    chatting = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat else {}
    found = simple_evaluate(
        lm, tasks=[str(path)], bootstrap_iters=0, log_samples=True, **chatting, **settings
    )
    (rows,) = found["samples"].values()
    return sorted(rows, key=lambda row: row["doc_id"])


def ours(folder, tasks, out, *, chat=False, protocols=("likelihood", "generation"), **settings):
    model = load_causal_lm(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    if not chat:
        tokenizer.chat_template = None
    evaluate_model(
        model, tokenizer, tasks=tasks, out_dir=out, model_name="it", protocols=list(protocols), **settings
    )
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def assert_same_choices(rows, expected):
    """Require equal choices and scores that differ, within an item, by the same amount for every option."""
    assert len(rows) == len(expected) == 12
    for row, other in zip(rows, expected, strict=True):
        found, scores = row["likelihood"]["scores"], [each[0][0] for each in other["resps"]]
        shift = [mine - its for mine, its in zip(found, scores, strict=True)]
        assert max(shift) - min(shift) < 1e-3, other["doc_id"]
        assert row["likelihood"]["correct"] == bool(other["acc"])
        if "likelihood_per_char" in row:
            assert row["likelihood_per_char"]["correct"] == bool(other["acc_norm"])
        assert row["options"][other["doc"]["gold"]] == row["gold"]


@pytest.mark.parametrize("folder", ["teacher", "student"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"description": "About {{question}}\n\n", "num_fewshot": 2},
        {"target_delimiter": "", "doc_to_text": "{{question}}\nAnswer:\n"},
        {"doc_to_text": "{{question}} It is "},
        {"doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "letter"},
        {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
        {"fewshot_config": {"sampler": "first_n"}, "num_fewshot": 1, "fewshot_delimiter": "\n###\n"},
    ],
    ids=["plain", "shots", "no delimiter", "trailing space", "letters", "templates", "first n"],
)
def test_choices_are_those_of_lm_eval(request, folder, keys, choice_task, tmp_path):
    folder = request.getfixturevalue(folder)
    path = choice_task(**keys)
    found = ours(folder, [path], tmp_path / "out", protocols=["likelihood", "likelihood_per_char"])
    assert_same_choices(found, theirs(folder, path))


def test_choices_in_a_chat_are_those_of_lm_eval(student, choice_task, tmp_path):
    path = choice_task(description="Be brief.", num_fewshot=2)
    found = ours(
        student, [path], tmp_path / "out", chat=True, protocols=["likelihood", "likelihood_per_char"]
    )
    assert_same_choices(found, theirs(student, path, chat=True))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"filter_list": None},
        {"num_fewshot": 2, "generation_kwargs": {"until": ["."], "max_gen_toks": 9}},
        {"doc_to_target": "{{choices}}", "filter_list": None},
        {
            "metric_list": [
                {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True, **MEAN}
            ],
            "filter_list": [
                {"name": "all", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
        },
        {"doc_to_choice": "choices", "doc_to_target": "gold"},
    ],
    ids=["regex", "none", "shots", "several targets", "metric settings", "choices"],
)
@pytest.mark.parametrize("chat", [False, True])
def test_answers_and_their_judgement_are_those_of_lm_eval(student, keys, chat, answer_task, tmp_path):
    # what the student says to the first document is right, or nothing would be
    path = answer_task(**keys)
    said = theirs(student, path, chat=chat)
    docs = [dict(row["doc"]) for row in said]
    for doc, row in list(zip(docs, said, strict=True))[::2]:
        doc["choices"][doc["gold"]] = row["filtered_resps"][0] or "x"
    content = yaml.safe_load(path.read_text())
    rows = tmp_path / "right.jsonl"
    rows.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    content["dataset_kwargs"]["data_files"]["test"] = str(rows)
    path.write_text(yaml.safe_dump(content))
    expected = theirs(student, path, chat=chat)
    found = ours(student, [path], tmp_path / "out", chat=chat)
    assert [row["generation"]["text"] for row in found] == [row["resps"][0][0] for row in expected]
    correct = [row["generation"]["correct"] for row in found]
    assert correct == [bool(row["exact_match"]) for row in expected]
    assert any(correct)
    assert found[0]["likelihood"] is None


def test_a_filter_is_chosen_by_name(student, answer_task, tmp_path):
    def regex(name, pattern):
        steps = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
        return {"name": name, "filter": steps}

    path = answer_task(filter_list=[regex("strict", "####(.*)"), regex("loose", "(.)")])
    (strict,), (loose,) = load_lm_eval_tasks(path), load_lm_eval_tasks(f"{path}@loose")
    assert (strict.name, loose.name) == ("tiny_answer", "tiny_answer-loose")
    rows = ours(student, [strict, loose], tmp_path / "out")
    extracted = [row["generation"]["extracted"] for row in rows]
    assert extracted[:12] == [None] * 12
    assert all(extracted[12:])
    with pytest.raises(EvalError, match='no filter "looser"; it has strict, loose'):
        load_lm_eval_tasks(f"{path}@looser")


def test_what_a_task_is_made_of_decides_its_identity(choice_task, answer_task):
    one, same = load_task(choice_task()), load_task(choice_task())
    assert (one.items_sha256, one.prompt_sha256) == (same.items_sha256, same.prompt_sha256)
    other = load_task(choice_task(description="Hello. "))
    assert one.items_sha256 == other.items_sha256
    assert one.prompt_sha256 != other.prompt_sha256
    longer = {"until": ["\n\n", "Question:"], "max_gen_toks": 15}
    assert (
        load_task(answer_task()).prompt_sha256
        != load_task(answer_task(generation_kwargs=longer)).prompt_sha256
    )
    ignoring = [{"metric": "exact_match", "ignore_case": True, **MEAN}]
    assert load_task(answer_task()).judge != load_task(answer_task(metric_list=ignoring)).judge


def test_tasks_of_both_kinds_stand_side_by_side(choice_task):
    names = [task.name for task in load_tasks(["everyday", choice_task()])]
    assert names == ["everyday", "tiny_choice"]
    assert is_lm_eval_task("lm_eval:arc_easy")
    assert not is_lm_eval_task("everyday")


def test_lm_eval_s_own_log_and_templates_are_as_they_were(choice_task):
    from lm_eval import utils

    before, env = logging.getLogger("lm_eval").level, utils.env
    load_task(choice_task())
    with pytest.raises(EvalError):
        load_task(choice_task(doc_to_text="{{nothing.here}}"))
    assert logging.getLogger("lm_eval").level == before
    assert utils.env is env


def test_included_files_are_read(choice_task, tmp_path, student):
    base = choice_task("base")
    path = tmp_path / "child.yaml"
    path.write_text('include: base.yaml\ntask: child\ndescription: "Well. "\n')
    assert is_lm_eval_file(path)
    (task,) = load_lm_eval_tasks(path)
    assert task.name == "child"
    assert task.items[0].prompt.text.startswith("Well. Question:")
    base.write_text("include: child.yaml\n")
    with pytest.raises(EvalError, match="includes itself"):
        load_task(path)


# ----- code -----

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()

def process(dataset):
    return dataset.map(lambda doc: {**doc, "question": doc["question"].upper()})

def results(doc, results):
    return {"exact_match": float(len(results[0]) % 2)}
"""


def add_code(path, line):
    path.with_name("code.py").write_text(CODE)
    path.write_text(path.read_text() + line)


def test_python_runs_only_where_the_user_says_so(choice_task):
    path = choice_task()
    add_code(path, "process_docs: !function code.process\n")
    with pytest.raises(EvalError, match=r"runs Python: process_docs: !function code\.process") as caught:
        load_task(path)
    assert "--trust-task-code" in str(caught.value)
    assert not path.with_name("ran").exists()
    (task,) = load_tasks([path], trust_code=True)
    assert path.with_name("ran").exists()
    assert "WHAT COMES AFTER" in task.items[0].prompt.text


def test_a_function_that_judges_is_asked_where_it_is_trusted(student, answer_task, tmp_path):
    path = answer_task(filter_list=None)
    add_code(path, "process_results: !function code.results\n")
    (task,) = load_lm_eval_tasks(path, trust_code=True)
    rows = ours(student, [task], tmp_path / "out")
    assert [row["generation"]["correct"] for row in rows] == [
        len(row["generation"]["text"]) % 2 == 1 for row in rows
    ]
    add_code(choice := answer_task("other", output_type="multiple_choice", doc_to_choice="choices",
             doc_to_target="gold", filter_list=None, generation_kwargs=None,
             metric_list=[{"metric": "acc", **MEAN}]), "process_results: !function code.results\n")  # fmt: skip
    with pytest.raises(EvalError, match="process_results: options are ranked by our protocols"):
        load_lm_eval_tasks(choice, trust_code=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ (''|attr('__class__')) }}",
        "{{ ''['__cla' ~ 'ss__'] }}",
        "{{ question.__init__.__globals__ }}",
    ],
)
def test_templates_of_a_file_cannot_reach_into_python(choice_task, template):
    with pytest.raises(EvalError, match=r"unsafe|undefined|SecurityError"):
        load_task(choice_task(doc_to_text=template))


def test_other_tags_are_refused_unread(choice_task):
    path = choice_task()
    path.write_text(path.read_text() + "metadata: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(EvalError, match="cannot read the task"):
        load_task(path)


# ----- refusals -----


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"doc_to_txt": "x"}, 'no key "doc_to_txt"'),
        ({"output_type": "loglikelihood"}, "output_type: loglikelihood"),
        ({"output_type": "loglikelihood_rolling"}, "output_type: loglikelihood_rolling"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"gen_prefix": "Well,"}, "gen_prefix"),
        ({"repeats": 3}, "repeats: 3"),
        ({"doc_to_choice": ["same", "same"], "doc_to_target": 0}, "two options are the same"),
        ({"doc_to_choice": ["only"], "doc_to_target": 0}, "ranking needs two"),
        ({"doc_to_target": "a zebra"}, "none of the 4 options"),
        ({"doc_to_target": "{{[0, 1]}}"}, "several right answers"),
        ({"metric_list": [{"metric": "mcc", **MEAN}]}, "metric_list has mcc"),
        ({"metric_list": [{"metric": "./evil", **MEAN}]}, "not a metric of lm-eval's own"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True, **MEAN}]}, "not a metric of lm-eval's own"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "take_first"}]}]}, "filter_list"),
        ({"doc_to_text": "{{gold}}"}, "doc_to_text is the number of a choice"),
        ({"test_split": "none"}, "cannot load the task"),
        ({"task": None}, 'needs "task"'),
        ({"task": 7}, "task must be a name, got 7"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number, 0 or more, got -1"),
        ({"num_fewshot": True}, "num_fewshot must be"),
        ({"metric_list": 3.5}, "metric_list must be a list"),
        ({"fewshot_config": [["a"]]}, "fewshot_config must be a mapping"),
        ({"fewshot_delimiter": [1]}, "fewshot_delimiter must be a text"),
        ({"doc_to_choice": None}, "cannot write the questions"),
    ],
)
def test_what_our_protocols_do_not_do_is_refused_by_name(choice_task, keys, said):
    with pytest.raises(EvalError, match=said.replace("[", r"\[")):
        load_task(choice_task(**keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"generation_kwargs": {"do_sample": True, "temperature": 0.7, "until": []}},
            "do_sample: answers are drawn",
        ),
        ({"generation_kwargs": {"temperature": 0.7, "until": []}}, "temperature: answers are drawn"),
        ({"generation_kwargs": {"max_gen_toks": 0}}, "above 0, got 0"),
        ({"generation_kwargs": {"max_gen_toks": "x"}}, "above 0, got .x."),
        ({"generation_kwargs": {"until": 3}}, "until must be texts"),
        ({"filter_list": []}, "filter_list is empty"),
        ({"generation_kwargs": {"num_beams": 4, "until": []}}, "generation_kwargs.num_beams"),
        ({"metric_list": [{"metric": "bleu", **MEAN}]}, "metric_list has bleu"),
        ({"doc_to_target": ""}, "gives no answer"),
    ],
)
def test_answers_that_ours_are_not_are_refused_by_name(answer_task, keys, said):
    with pytest.raises(EvalError, match=said):
        load_task(answer_task(**keys))


def test_a_temperature_without_sampling_has_no_effect_as_in_lm_eval(answer_task):
    settings = {"do_sample": False, "temperature": 0.7, "until": None, "max_gen_toks": 3}
    (task,) = [load_task(answer_task(generation_kwargs=settings))]
    assert (task.stop, task.max_new_tokens) == ((), 3)


def test_groups_in_a_file_are_refused_with_their_members(tmp_path):
    path = tmp_path / "group.yaml"
    path.write_text("group: many\ntask:\n  - one\n  - two\n")
    with pytest.raises(EvalError, match="group of tasks: one, two"):
        load_task(path)


def test_options_in_another_order_are_asked_in_the_same_words(choice_task):
    listed = "{{question}}\n{% for c in choices %}{{'ABCD'[loop.index0]}}. {{c}}\n{% endfor %}Answer:"
    letters = {"doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "letter"}
    (item, *_) = load_task(choice_task(doc_to_text=listed, num_fewshot=1, **letters)).items
    moved = reordered(item, [3, 2, 1, 0])
    first, last = item.prompt.text, moved.prompt.text
    assert moved.prompt.lead == item.prompt.lead
    assert sorted(first) == sorted(last) != first
    assert last.endswith("Answer:")
    # the example before the question is as it was
    assert last.split("\n\n")[0] == first.split("\n\n")[0]
    assert moved.gold == "DCBA"["ABCD".index(item.gold)]


def test_the_first_metric_of_a_task_ranks(choice_task):
    norm = [{"metric": "acc_norm", **MEAN}, {"metric": "acc", **MEAN}]
    assert load_task(choice_task(metric_list=norm)).metric == "accuracy_per_char"
    assert load_task(choice_task()).metric == "accuracy"


def test_metrics_that_are_not_computed_are_said(choice_task):
    metrics = [
        {"metric": "acc", **MEAN},
        {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    ]
    assert "mcc is not computed" in load_task(choice_task(metric_list=metrics)).description


def test_functions_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text(
        "task: x\nmetric_list:\n  - metric: !function a.b\nfewshot_config: {samples: !function c.d}\n"
    )
    found = functions_of(read_lm_eval_file(path))
    assert found == [("metric_list.0.metric", "a.b"), ("fewshot_config.samples", "c.d")]


def test_scores_are_numbers(student, choice_task, tmp_path):
    rows = ours(student, [choice_task()], tmp_path / "out", limit=3)
    assert len(rows) == 3
    assert all(math.isfinite(score) for row in rows for score in row["likelihood"]["scores"])
    assert all(row["generation"]["num_tokens"] > 0 or row["generation"]["ended"] for row in rows)
