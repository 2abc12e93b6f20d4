"""HumanEval: programs are found in answers, run with their tests if that is allowed, and judged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gendistill_evals import EvalError, Item, code, evaluate_model, load_task, sandbox
from gendistill_evals.code import Problem, allowed, judge_code, problem_of, program_of, run_tests, task_row
from gendistill_evals.results import read_samples

HERE = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=f"nothing can be contained here: {sandbox.why_not()}"
)
PROMPT = (
    "from typing import List\n\n\ndef helper(x):\n    return x + 1\n\n\ndef total(values: List[int]) -> int:\n"
    '    """Add the values.\n    >>> total([1, 2])\n    3\n    """\n'
)
TEST = (
    "def check(candidate):\n    assert candidate([]) == 0\n    assert candidate([1, 2]) == 3\n"
    "    assert candidate([-1, 5, 7]) == 11\n"
)
PROBLEM = Problem(PROMPT, "total", TEST)
ITEM = Item("t/0", PROMPT, json.dumps(PROBLEM._asdict()), None, None)

WHOLE = (
    "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result"
)
CALLS = "def total(values):\n    return add(values)"
ADD = "def add(values):\n    return sum(values)"
RIGHT = {
    "body": "    result = 0\n    for value in values:\n        result += value\n    return result\n",
    "one line": "    return sum(values)",
    "body without the first indent": "return sum(values)",
    "body that lost the first indent": "n = 0\n    for value in values:\n        n += value\n    return n",
    "loop that lost the first indent": "for value in values[:0]:\n        pass\n    return sum(values)",
    "body that lost all indents": "result = 0\nfor value in values:\n    result += value\nreturn result",
    "loop that lost all indents": "for value in values[:0]:\n    pass\nreturn sum(values)",
    "body and another function": "    return sum(values)\n\n\ndef other(x):\n    return nothing(",
    "body and examples": "    return sum(values)\n\nprint(total([1]))\nassert total([1]) == 2\n",
    "body and a main": "    return sum(values)\n\n\nif __name__ == '__main__':\n    raise SystemExit\n",
    "body and prose": "    return sum(values)\n\nThis adds the values, one by one.",
    "body that calls what the prompt defines": "    return sum(helper(value) - 1 for value in values)",
    "function": WHOLE,
    "function with an import": f"import math\n\n{WHOLE}",
    "function with types of the prompt": "def total(values: List[int]) -> int:\n    return sum(values)",
    "block": f"```python\n{WHOLE}\n```",
    "block with prose": f"Sure! Here is the function:\n\n```python\n{WHOLE}\n```\n\nIt works since 1 + 2 = 3.",
    "block without language": f"```\n{WHOLE}\n```",
    "block without end": f"Here:\n```python\n{WHOLE}",
    "block of a body": "```python\n    return sum(values)\n```",
    "indented block": "1. Like this:\n\n   ```python\n   def total(values):\n       return sum(values)\n   ```",
    "second block": f"Run this:\n```bash\npip install x\n```\n```python\nprint(1)\n```\n```python\n{WHOLE}\n```",
    "tildes": f"~~~python\n{WHOLE}\n~~~",
    "prose without a block": f"Here is the function:\n\n{WHOLE}\n\nIt adds the values.",
    "examples in the block": f"```python\n{WHOLE}\n\nprint(total([1, 2]))\nassert total([1]) == 5\n```",
    "docstring at the margin": 'def total(values):\n    """Add.\n\nAll of them.\n"""\n    return sum(values)',
    "helper after": f"```python\n{CALLS}\n\n{ADD}\n```",
    "helper before": f"```python\n{ADD}\n\n{CALLS}\n```",
    "constant before": "```python\nSTART = 0\n\ndef total(values):\n    return sum(values, START)\n```",
    "words before in a block": f'```python\nNOTE = """\nsome words\n"""\n\n{WHOLE}\n```',
    "body without its first indent, and more": "result = sum(values)\n    return result\n\nprint(total([1]))",
    "block without its first indent, and prose": "for _ in values:\n        pass\n    return sum(values)\nIt adds.",
    "line without its indent, and prose": "return sum(values)\n\nHope it helps!",
    "body without indents, and prose": "if not values:\n    return 0\nreturn sum(values)\n\nHope it helps!",
    "return over lines without indents": "return sum(\n    values,\n)",
    "future import": f"```python\nfrom __future__ import annotations\n\n{WHOLE}\n```",
    "class before": "```python\nclass Adder:\n    pass\n\ndef total(values):\n    return sum(values)\n```",
}
WRONG = {
    "other sum": ("    return sum(values) + 1", "RAISED"),
    "pass": ("    pass", "RAISED"),
    "raises": ("    raise ValueError('no')", "RAISED"),
    "endless": ("    while True: pass", "TIME"),
    "leaves": ("    import os\n    os._exit(0)", "EXITED"),
    "leaves at once": ("```python\ndef total(values):\n    return 1\nimport sys\nsys.exit(0)\n```", "RAISED"),
    "writes": ("    open('/tmp/gendistill-x', 'w')", "REFUSED"),
    "forks": ("    import os\n    os.fork()", "REFUSED"),
    "hog": ("    return len(bytearray(1 << 40))", "MEMORY"),
}
NOTHING = ["", "   \n", "```python\n```"]
UNREADABLE = ["I would add the values one by one.", "```python\ndef total(values:\n    return\n```"]


@HERE
@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_in_every_wrapping_are_right(name):
    with allowed():
        judgement = judge_code(ITEM, RIGHT[name])
    assert judgement.correct, judgement.extracted


@HERE
@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_wrong_and_say_why(name, monkeypatch):
    monkeypatch.setattr(code, "LIMITS", sandbox.Limits(wall_s=1.5))
    text, ended = WRONG[name]
    with allowed():
        assert not judge_code(ITEM, text).correct
        program = program_of(PROBLEM, text)
        assert program is not None
        assert run_tests(PROBLEM, program).ended is sandbox.Ended[ended]
    assert not Path("/tmp/gendistill-x").exists()


@HERE
@pytest.mark.parametrize("text", [*NOTHING, *UNREADABLE])
def test_answers_without_a_program_are_extraction_failures(text):
    with allowed():
        assert judge_code(ITEM, text) == (None, False)


def test_no_program_runs_unless_it_is_allowed(tmp_path):
    answer = f"    open({str(tmp_path / 'ran')!r}, 'w')"
    with pytest.raises(EvalError, match="off unless asked for") as caught:
        judge_code(ITEM, answer)
    assert "--allow-code" in (caught.value.hint or "")
    assert "off unless" in (code.why_not() or "")
    assert list(tmp_path.iterdir()) == []


@HERE
def test_permission_ends_with_its_context():
    with allowed():
        assert code.why_not() is None
    assert code.why_not() is not None


def test_permission_is_refused_where_nothing_can_be_contained(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "this is a test")
    with pytest.raises(EvalError, match="cannot be contained on this machine: this is a test"), allowed():
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    "gold", ["", "x", "[]", "{}", '{"prompt": "", "entry_point": "a b", "test": ""}', "[" * 9999]
)
def test_items_of_another_shape_are_refused(gold):
    with pytest.raises(EvalError, match="cannot be judged by its tests"):
        problem_of(Item("a", "p", gold, None, None))


def test_rows_of_another_shape_are_refused():
    with pytest.raises(EvalError, match="lacks entry_point, test"):
        task_row({"task_id": "a", "prompt": "b"})


def test_long_answers_are_read_in_linear_time():
    for text in (
        "```" * 20_000,
        "x = " * 20_000,
        "def total(" * 5000,
        "    a\n" * 20_000,
        '"""' * 20_000 + "\ndef total(",
    ):
        program_of(PROBLEM, text)


@HERE
def test_built_in_problems_are_whole():
    task = load_task("humaneval", data="sample")
    assert len(task.items) == 20
    with allowed():
        for item in task.items[:3]:
            problem = problem_of(item)
            assert problem.prompt in item.prompt
            assert not judge_code(item, "    pass").correct


# Own solutions of the first built-in problems, so that the suite has seen one pass.
SOLUTIONS = {
    "HumanEval/7": "    return [string for string in strings if substring in string]",
    "HumanEval/14": "    return [string[:end] for end in range(1, len(string) + 1)]",
    "HumanEval/15": "    return ' '.join(str(number) for number in range(n + 1))",
    "HumanEval/27": "    return string.swapcase()",
    "HumanEval/34": "    return sorted(set(l))",
    "HumanEval/35": "    return max(l)",
}


@HERE
@pytest.mark.parametrize("name", SOLUTIONS)
def test_built_in_problems_are_solved(name):
    item = next(item for item in load_task("humaneval", data="sample").items if item.id == name)
    with allowed():
        assert judge_code(item, SOLUTIONS[name]).correct
        assert not judge_code(item, "    return None").correct


@pytest.mark.slow
@HERE
def test_canonical_solutions_pass_and_broken_ones_do_not():
    """HUMANEVAL_ROWS names a file of problems with their canonical solutions."""
    if not (named := os.environ.get("HUMANEVAL_ROWS")):
        pytest.skip("HUMANEVAL_ROWS names no file of problems with solutions")
    rows = [json.loads(line) for line in Path(named).read_text().splitlines()]
    failed, passed = [], []
    with allowed():
        for row in rows:
            content = task_row(row)
            item = Item(content["id"], content["prompt"], content["gold"], None, None)
            solution = row["canonical_solution"]
            for text in (solution, f"```python\n{row['prompt']}{solution}\n```"):
                if not judge_code(item, text).correct:
                    failed.append(row["task_id"])
            for text in ("    return None\n", f"    _ = 1 / 0\n{solution}"):
                if judge_code(item, text).correct:
                    passed.append(row["task_id"])
    assert (failed, passed) == ([], [])


@HERE
def test_a_model_is_scored_by_the_programs_that_it_writes(speaker, chat_tokenizer, tmp_path):
    right = "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])"
    settings = {
        "tasks": [load_task("humaneval", data="sample")],
        "limit": 2,
        "protocols": ["generation"],
        "model_name": "m",
    }
    model = speaker(lambda prompt: right)
    with pytest.raises(EvalError, match="off unless asked for"):
        evaluate_model(model, chat_tokenizer, out_dir=tmp_path, **settings)
    with allowed():
        results = evaluate_model(model, chat_tokenizer, out_dir=tmp_path, **settings)
    score = results["tasks"][0]["generation"]
    assert (score["value"], score["n"], score["extraction_failures"]) == (0.5, 2, 0)
    first, second = read_samples(tmp_path)
    assert [row["generation"]["correct"] for row in (first, second)] == [True, False]
    assert first["generation"]["extracted"].endswith(right)
