"""HumanEval and MBPP: formats, prompts, programs, pass@k and the counts of an evaluation, on problems of our own."""

import gzip
import itertools
import json
from types import SimpleNamespace

import pytest

from prism_pipelines.evaluation import wilson_interval
from prism_pipelines.evaluation.code import tasks as code
from prism_pipelines.evaluation.code.sandbox import Limits, SandboxUnavailable, isolation_problem
from prism_pipelines.evaluation.code.tasks import (
    build_program,
    build_prompt,
    estimate,
    evaluate_code,
    load_problems,
    pass_at_k,
)

# Verdicts are the same without isolation (test_sandbox.py), so these tests run everywhere.
RUN = {"allow_execution": True, "require_isolation": False, "limits": Limits(seconds=5.0)}
HUMANEVAL = [
    {
        "task_id": "Own/0",
        "prompt": "def shift(c):\n    return chr(ord(c) + 1)\n\n\ndef shifted(s: str) -> str:\n"
        '    """Every letter shifted.\n    >>> shifted("ab")\n    \'bc\'\n    """\n',
        "entry_point": "shifted",
        "canonical_solution": '    return "".join(shift(c) for c in s)\n',
        "test": 'def check(candidate):\n    assert candidate("ab") == "bc"\n'
        '    assert candidate("xyz") == "".join(shift(c) for c in "xyz")\n',
    },
    {
        "task_id": "Own/1",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of the even numbers."""\n',
        "entry_point": "total",
        "canonical_solution": "    return sum(x for x in xs if x % 2 == 0)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2, 4]) == 6\n    assert candidate([]) == 0\n",
    },
]


def mbpp(task_id, text, solution, tests, **more):
    return {"task_id": task_id, "text": text, "code": solution, "test_list": tests, "test_setup_code": "", **more}


MBPP = [
    mbpp(2, "Write a function to add.", "def add(a, b):\r\n  return a + b", ["assert add(1, 2) == 3"]),
    mbpp(3, "Write a function to negate.", "def neg(a):\n  return -a", ["assert neg(1) == -1"]),
    mbpp(4, "Write a function to double.", "def dbl(a):\n  return 2 * a", ["assert dbl(1) == 2"]),
    mbpp(11, "Write a function for the area.", "import math\ndef area(r):\n  return math.pi * r * r",
         ["assert math.isclose(area(1), math.pi)", "assert area(0) == 0"]),
    mbpp(12, "Write a function for the depth.",
         "class Node:\n  def __init__(self, n=None):\n    self.n = n\ndef depth(t):\n"
         "  return 1 + depth(t.n) if t else 0",
         ["assert depth(root) == 2"], test_setup_code="root = Node()\nroot.n = Node()"),
]  # fmt: skip


def save(tmp_path, rows, name="problems.jsonl"):
    path = tmp_path / name
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def answers(table):
    """A generator that looks the prompt's problem up in {a piece of the prompt's last task: completions in turn}."""
    turns = {key: itertools.cycle(value) for key, value in table.items()}

    def generate(prompts):
        return [next(next(turn for key, turn in turns.items() if key in prompt[-200:])) for prompt in prompts]

    return generate


# --- pass@k -----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass():
    for n in range(1, 7):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                share = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_the_interval_of_pass_at_k_has_a_width():
    assert estimate([0] * 20, 1, 1) == {"value": 0, "interval": list(wilson_interval(0, 20))}
    assert estimate([1] * 15 + [0] * 5, 1, 1)["interval"] == list(wilson_interval(15, 20))
    assert estimate([4] * 20, 4, 2)["interval"] == list(wilson_interval(20, 20))
    assert estimate([1], 1, 1) == {"value": 1, "interval": None}
    low, high = estimate([0, 2, 4, 1], 4, 1)["interval"]
    assert 0 < low < estimate([0, 2, 4, 1], 4, 1)["value"] < high < 1


def test_a_line_separator_inside_a_row_does_not_cut_it(tmp_path):
    row = {**HUMANEVAL[0], "prompt": "# a\u2028b\n" + HUMANEVAL[0]["prompt"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_problems(tmp_path / "p.jsonl")[0].text == row["prompt"]


def test_pass_at_k_refuses_more_than_there_is():
    for n, c, k in [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)]:
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(n, c, k)


# --- files ------------------------------------------------------------------------------------------------------------


def test_all_formats_give_the_same_problems(tmp_path):
    for rows in (HUMANEVAL, MBPP):
        plain = load_problems(save(tmp_path, rows))
        assert load_problems(save(tmp_path, rows, "problems.jsonl.gz")) == plain
        listed = tmp_path / "problems.json"
        listed.write_text(json.dumps(rows, indent=1))
        assert load_problems(listed) == plain
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
        assert load_problems(tmp_path / "p.parquet") == plain


def test_sanitized_mbpp_rows_are_read(tmp_path):
    row = {"task_id": 20, "prompt": "Write a root.", "code": "def r(x):\n  return x ** 0.5", "source_file": "x",
           "test_imports": ["import math"], "test_list": ["assert math.isclose(r(4), 2)"]}  # fmt: skip
    (problem,) = load_problems(save(tmp_path, [row]))
    assert problem.text == "Write a root." and problem.names == ("r",) and "import math" in problem.tests


def test_bad_files_are_named(tmp_path):
    broken = [
        ([{"question": "?"}], "'test_list' is missing"),
        ([{**HUMANEVAL[0], "prompt": "def ("}], "Problem 1"),
        ([{**HUMANEVAL[0], "entry_point": None}], "Problem 1"),
        ([HUMANEVAL[0], HUMANEVAL[0]], "more than once"),
        ([HUMANEVAL[0], MBPP[0]], "mixes"),
        ([mbpp(1, "x", "y", [])], "`test_list` is empty"),
        ([], "no problem"),
        ([3], "not an object"),
    ]
    for rows, message in broken:
        with pytest.raises(ValueError, match=message):
            load_problems(save(tmp_path, rows))
    with pytest.raises(ValueError, match="is not a file"):
        load_problems(tmp_path / "absent.jsonl")
    (tmp_path / "text.jsonl").write_text("def f(): pass")
    with pytest.raises(ValueError, match="not JSON Lines"):
        load_problems(tmp_path / "text.jsonl")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-9])
    with pytest.raises(ValueError, match="not JSON Lines"):
        load_problems(tmp_path / "half.jsonl.gz")


def test_tests_may_not_let_the_program_replace_a_builtin(tmp_path):
    (problem,) = load_problems(save(tmp_path, [mbpp(1, "x", "y", ["assert set(f(1)) == set([y for y in (1,)])"])]))
    assert problem.names == ("f",)
    asked = mbpp(1, "Write a sum.", "def sum(a, b):\n  return a + b", ["assert sum(1, 2) == 3"])
    assert load_problems(save(tmp_path, [asked]))[0].names == ("sum",)


# --- prompts and programs ---------------------------------------------------------------------------------------------


def test_prompts_are_the_published_ones(tmp_path):
    first, *_ = load_problems(save(tmp_path, HUMANEVAL))
    assert build_prompt(first, "base", []) == HUMANEVAL[0]["prompt"]
    assert build_prompt(first, "instruct", []) == (
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
        f"{HUMANEVAL[0]['prompt']}\n```\n"
    )
    add, neg, *_ = load_problems(save(tmp_path, MBPP))
    assert build_prompt(neg, "base", [add]) == (
        "You are an expert Python programmer, and here is your task: Write a function to add. "
        "Your code should pass these tests:\n\nassert add(1, 2) == 3\n[BEGIN]\n"
        "def add(a, b):\r\n  return a + b\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to negate. "
        "Your code should pass these tests:\n\nassert neg(1) == -1\n[BEGIN]\n"
    )


@pytest.mark.parametrize("after", ["\nclass A:", "\ndef g():", "\n# next", "\nif __name__:", "\nprint(1)"])
def test_base_completions_end_at_the_first_stop(tmp_path, after):
    problem = load_problems(save(tmp_path, HUMANEVAL))[1]
    body = "    if xs:\n        print(xs)\n    # a comment\n    return 1\n"
    assert build_program(problem, "base", f"{body}{after} and so on") == problem.text + body


def test_instruct_answers_are_taken_from_their_fence(tmp_path):
    problem = load_problems(save(tmp_path, HUMANEVAL))[0]
    whole = "def shifted(s):\n    return s"
    said = f"First:\n```\nx = 1\n```\nHere:\n```python\n{whole}\n```\nDone: ```ok```"
    assert build_program(problem, "instruct", said) == f"{problem.text}\n\n{whole}"
    assert build_program(problem, "instruct", f"```python\n{whole}") == f"{problem.text}\n\n{whole}"  # fence left open
    assert build_program(problem, "instruct", "    return s") == problem.text + "    return s"
    add = load_problems(save(tmp_path, MBPP))[0]
    assert build_program(add, "base", "def add(a, b): pass\n[DONE]\nmore") == "def add(a, b): pass\n"


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_canonical_solutions_pass(tmp_path):
    humaneval = answers(
        {"Every letter": [HUMANEVAL[0]["canonical_solution"]], "even": [HUMANEVAL[1]["canonical_solution"]]}
    )
    result = evaluate_code(humaneval, save(tmp_path, HUMANEVAL), **RUN)
    assert result["outcomes"] == {"passed": 2} and result["pass_at_k"]["1"]["value"] == 1
    solved = answers({"area": [MBPP[3]["code"] + "\n[DONE]"], "depth": [MBPP[4]["code"]]})
    result = evaluate_code(solved, save(tmp_path, MBPP), **RUN)
    assert result["outcomes"] == {"passed": 2} and result["few_shot"] == 3 and result["problems"] == 2


def test_counts_and_pass_at_k_of_a_mixed_run(tmp_path):
    right, wrong, broken = HUMANEVAL[1]["canonical_solution"], "    return 1\n", "    return (\n"
    generate = answers({"Every letter": ["    return undefined\n"], "even": [right, wrong, broken, right]})
    seen = []
    result = evaluate_code(
        generate, save(tmp_path, HUMANEVAL), num_samples=4, ks=(1, 2), batch_size=3, workers=2,
        on_progress=lambda *progress: seen.append(progress), **RUN,
    )  # fmt: skip
    assert result["outcomes"] == {"error": 4, "passed": 2, "wrong": 1, "syntax": 1}
    assert result["errors"] == {"NameError": 4, "AssertionError": 1, "SyntaxError": 1}
    assert result["syntax_valid"] == 7 / 8
    assert result["pass_at_k"]["1"]["value"] == pytest.approx((0 + 2 / 4) / 2)
    assert result["pass_at_k"]["2"]["value"] == pytest.approx((0 + 5 / 6) / 2)
    assert [s["outcome"] for s in result["samples"][4:]] == ["passed", "wrong", "syntax", "passed"]
    assert [s["sample"] for s in result["samples"]] == [0, 1, 2, 3] * 2
    assert seen[-1] == ("execute", 8, 8) and ("generate", 8, 8) in seen
    assert json.loads(json.dumps(result)) == result


def test_a_pipeline_gets_its_settings_and_one_stream_per_sample(tmp_path):
    calls = []

    class Pipeline:
        scheduler, tokenizer = object(), SimpleNamespace(all_special_tokens=["<END>"])

        def __call__(self, prompts, *, generator, use_chat_template, gen_length):
            calls.append((len(prompts), [g.initial_seed() for g in generator], use_chat_template, gen_length))
            return SimpleNamespace(texts=["    return 6\n"] * len(prompts))

    path = save(tmp_path, HUMANEVAL)
    for batch in (4, 3):
        evaluate_code(Pipeline(), path, num_samples=2, batch_size=batch, generation={"gen_length": 9}, **RUN)
    assert calls[0][1] == calls[1][1] + calls[2][1] and len(set(calls[0][1])) == 4
    assert calls[0][2:] == (False, 9)
    with pytest.raises(ValueError, match="plain callable"):
        evaluate_code(lambda p: p, path, generation={"gen_length": 9}, **RUN)


def test_execution_is_opt_in_and_isolation_is_required(tmp_path, monkeypatch):
    path = save(tmp_path, HUMANEVAL)
    with pytest.raises(ValueError, match="allow_execution=True"):
        evaluate_code(lambda prompts: prompts, path)
    monkeypatch.setattr(code, "isolation_problem", lambda: "no namespaces here.")
    with pytest.raises(SandboxUnavailable, match="no namespaces here"):
        evaluate_code(lambda prompts: prompts, path, allow_execution=True)
    result = evaluate_code(lambda prompts: ["    return 0"] * len(prompts), path, **RUN)
    assert result["isolated"] is False


@pytest.mark.skipif(isolation_problem() is not None, reason=str(isolation_problem()))
def test_isolated_runs_say_so(tmp_path):
    solved = answers({"Every letter": [HUMANEVAL[0]["canonical_solution"]], "even": ["    return 1"]})
    result = evaluate_code(solved, save(tmp_path, HUMANEVAL), allow_execution=True)
    assert result["isolated"] is True and result["outcomes"] == {"passed": 1, "wrong": 1}


def test_completions_outlive_a_machine_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        assert (tmp_path / "kept.jsonl").exists()
        raise SandboxUnavailable("no more processes")

    monkeypatch.setattr(code, "run_tests", fail)
    right = answers({"Every letter": [HUMANEVAL[0]["canonical_solution"]], "even": ["    return 1"]})
    with pytest.raises(OSError, match=r"after 0 of 2 programs \(no more processes\)\. The completions are in .*kept"):
        evaluate_code(right, save(tmp_path, HUMANEVAL), completions_file=tmp_path / "kept.jsonl", **RUN)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept[1] == {"task_id": "Own/1", "sample": 0, "completion": "    return 1"}


def test_bad_generators_and_settings_are_named(tmp_path):
    path, many = save(tmp_path, HUMANEVAL), save(tmp_path, MBPP, "mbpp.jsonl")
    generators = [
        (lambda prompts: ["    return [MASK]"] * len(prompts), r"special token '\[MASK\]'"),
        (lambda prompts: ["    return 1<|endoftext|>"] * len(prompts), "special token"),
        (lambda prompts: [" \n"] * len(prompts), "completions are empty"),
        (lambda prompts: ["x"], "list of 2 completions, got 1"),
        (lambda prompts: "xy", "got a str"),
        (lambda prompts: [None] * len(prompts), "got a NoneType"),
    ]
    for generate, message in generators:
        with pytest.raises(ValueError, match=message):
            evaluate_code(generate, path, **RUN)
    settings = [
        ({"style": "chat"}, "`style`"), ({"ks": (2,)}, "`ks`"), ({"num_samples": 0}, "`num_samples`"),
        ({"few_shot": 1}, "`few_shot`"), ({"split": "dev"}, "`split`"), ({"limit": 0}, "`limit`"),
    ]  # fmt: skip
    for setting, message in settings:
        with pytest.raises(ValueError, match=message):
            evaluate_code(lambda prompts: prompts, path, **{**RUN, **setting})
    with pytest.raises(ValueError, match="lacks 2, 3, 4"):
        evaluate_code(lambda prompts: prompts, save(tmp_path, MBPP[3:]), **RUN)
    with pytest.raises(ValueError, match="split='all'"):
        evaluate_code(lambda prompts: prompts, save(tmp_path, MBPP[:3]), few_shot=0, **RUN)
    limited = evaluate_code(lambda prompts: ["def area(r): return 0"] * len(prompts), many, limit=1, **RUN)
    assert limited["partial"] is True and limited["problems"] == 1
