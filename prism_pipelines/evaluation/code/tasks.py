"""HumanEval and MBPP: prompts and stop rules as published, unbiased pass@k, execution in the sandbox.

A generator is any callable from prompts (a list of str) to completions (a list of str of the same length), or a
`PrismPipeline`.
"""

from __future__ import annotations

import ast
import builtins
import gzip
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ...atomic_files import write_atomically
from ...schedulers.validation import is_int, require
from ..statistics import bootstrap_interval, wilson_interval
from .sandbox import Limits, SandboxUnavailable, Verdict, isolation_problem, run_tests

HUB = {"humaneval": "openai/openai_humaneval", "mbpp": "google-research-datasets/mbpp"}
# Codex paper (arXiv 2107.03374, section 2.1) for HumanEval; MBPP's prompt closes an answer with [DONE] (2108.07732).
STOPS = {"humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), "mbpp": ("[DONE]",)}
SHOTS = {("humaneval", "base"): 0, ("humaneval", "instruct"): 0, ("mbpp", "base"): 3, ("mbpp", "instruct"): 0}
MBPP_SHOTS = (2, 3, 4)  # task ids of MBPP's prompt examples, in the order they are shown
MBPP_TEST = range(11, 511)  # task ids of MBPP's test split
SPECIAL = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<eos>", "</s>")
FENCE = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Problem:
    """One task.

    Args:
        benchmark: "humaneval" or "mbpp".
        task_id: as in the file; unique.
        text: HumanEval: the code to complete. MBPP: the task in words.
        tests: source that the judge runs.
        names: functions or classes of the program that the tests use.
        context: source with the judge's own helpers (HumanEval: the prompt; its stub is replaced by the program's).
        shown_tests: MBPP: the assertions shown in the prompt.
        solution: the canonical one; a completion for HumanEval, a program for MBPP.
    """

    benchmark: str
    task_id: str
    text: str
    tests: str
    names: tuple[str, ...]
    context: str
    shown_tests: tuple[str, ...]
    solution: str


def load_problems(source: str | Path) -> list[Problem]:
    """HumanEval or MBPP problems; the fields say which of the two.

    Args:
        source: a file (.jsonl, .jsonl.gz, .json, .json.gz: one object a line, or a list of them; .parquet: needs
            `datasets`), or "humaneval" / "mbpp" / a Hub id (all splits; needs `datasets` and a network).
    Returns:
        Problems in the order of the file; for MBPP all of them, the prompt examples included.
    Raises:
        ValueError: no such file, another format, a row that lacks a field or does not compile, a repeated task id.
        ImportError: `datasets` is needed and not installed.
    """
    problems = []
    for number, row in enumerate(_rows(source), 1):
        try:
            problems.append(_problem(row))
        except (ValueError, SyntaxError, KeyError, TypeError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"Problem {number} of {str(source)!r}: {reason}. Expected HumanEval rows (task_id, prompt, "
                "entry_point, test, canonical_solution) or MBPP rows (task_id, text or prompt, code, test_list)."
            ) from error
    if not problems:
        raise ValueError(f"{str(source)!r} holds no problem.")
    doubled = [task for task, count in Counter(p.task_id for p in problems).items() if count > 1]
    if doubled:
        raise ValueError(f"{str(source)!r} holds the task id {doubled[0]!r} more than once.")
    if len({p.benchmark for p in problems}) > 1:
        raise ValueError(f"{str(source)!r} mixes HumanEval and MBPP rows; give one benchmark at a time.")
    return problems


def _rows(source: str | Path) -> list:
    path = Path(source)
    if not path.is_file():
        name = HUB.get(str(source), str(source))
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in (".jsonl", ".json", ".gz", ".parquet"):
            raise ValueError(
                f"{str(source)!r} is not a file, and neither one of {', '.join(HUB)} nor a Hub id owner/name."
            )
        splits = _datasets().load_dataset(name)
        return [row for split in splits.values() for row in split]
    if path.suffix == ".parquet":
        return list(_datasets().Dataset.from_parquet(str(path)))
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(source)!r} is not JSON Lines, a JSON list or parquet: {error}.") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Parquet files and the Hub need datasets: pip install "prism-pipelines[train]". A .jsonl file does not.'
        ) from error
    return datasets


def _problem(row: Any) -> Problem:
    if not isinstance(row, dict):
        raise TypeError(f"it is a {type(row).__name__}, not an object")
    if "entry_point" in row:
        context, entry = row["prompt"], row["entry_point"]
        tests = f"{row['test']}\n\ncheck({entry})\n"
        problem = Problem(
            "humaneval", str(row["task_id"]), context, tests, (entry,), context, (), row.get("canonical_solution", "")
        )
    else:
        shown = tuple(row["test_list"])
        setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code") or ""])
        tests = "\n".join([setup, *shown])
        names, modules = _used(tests, row.get("code", ""))
        context = "".join(f"import {name}\n" for name in modules)
        text = row["text"] if "text" in row else row["prompt"]
        problem = Problem("mbpp", str(row["task_id"]), text, tests, names, context, shown, row.get("code", ""))
        if not shown:
            raise ValueError("`test_list` is empty")
    if not all(isinstance(part, str) for part in (problem.text, problem.tests, problem.solution, *problem.names)):
        raise TypeError("a field that should be text is none")
    for source in (problem.context, problem.tests):
        compile(source, problem.task_id, "exec")
    if not problem.names:
        raise ValueError("its tests use nothing of the program")
    return problem


def _used(tests: str, solution: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What tests use and do not define: names of the program, and modules of the standard library (as `math.pi`)."""
    tree = ast.parse(tests)
    nodes = list(ast.walk(tree))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {
        (a.asname or a.name).split(".")[0]
        for n in nodes
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    prefixes = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    used = dict.fromkeys(n.id for n in nodes if isinstance(n, ast.Name) and n.id not in own)
    # A builtin may not be replaced by the program (`set` would then decide about equality), unless the task is to write
    # a function of that name: MBPP asks for a `sum`.
    free = [name for name in used if not hasattr(builtins, name) or _defines(solution, name)]
    modules = [n for n in free if n in prefixes and n not in called and n in sys.stdlib_module_names]
    return tuple(n for n in free if n not in modules), tuple(modules)


def build_prompt(problem: Problem, style: str, examples: list[Problem]) -> str:
    """The prompt of a problem.

    HumanEval, base: the code to complete (2107.03374). MBPP, base: the paper's prompt after worked examples
    (2108.07732, section 3; layout of lm-evaluation-harness). Instruct: the user message of lm-evaluation-harness
    (humaneval_instruct, mbpp_instruct), without its opening of the answer, which a chat model here writes itself.

    Args:
        style: "base" or "instruct".
        examples: solved problems shown first.
    """
    if problem.benchmark == "humaneval":
        if style == "base":
            return problem.text
        task = "Write a solution to the following problem and make sure that it passes the tests:"
        return f"{task}\n```python\n{problem.text}\n```\n"
    if style == "base":
        solved = [f"{_mbpp_task(e, ' ')}\n[BEGIN]\n{e.solution}\n[DONE]\n\n" for e in examples]
        return "".join(solved) + f"{_mbpp_task(problem, ' ')}\n[BEGIN]\n"
    solved = [f"{_mbpp_task(e, chr(10))}\n```python\n{e.solution}\n```\n\n" for e in examples]
    return "".join(solved) + _mbpp_task(problem, "\n")


def _mbpp_task(problem: Problem, gap: str) -> str:
    tests = "\n".join(problem.shown_tests)
    blank = "\n" if gap == " " else ""
    opening = "You are an expert Python programmer, and here is your task:"
    return f"{opening}{gap}{problem.text}{gap}Your code should pass these tests:\n{blank}{tests}"


def build_program(problem: Problem, style: str, completion: str) -> str:
    """The program to execute for a completion.

    Base: the completion up to the first stop string (`STOPS`); for HumanEval it is appended to the prompt. For MBPP, of
    an answer in a fence only the content of the fence is kept. Instruct: the first fenced block that defines what the
    tests use, else the first block, else the whole answer. For HumanEval this follows the prompt's own code if it
    defines the function again; else it is appended to the prompt as its continuation.
    """
    if style == "base" and problem.benchmark == "humaneval":
        return problem.text + cut(completion, STOPS["humaneval"])
    if style == "base":
        completion = cut(completion, STOPS["mbpp"])
    blocks = FENCE.findall(completion)
    defines = [b for b in blocks if all(_defines(b, name) for name in problem.names)]
    code = (defines or blocks or [completion])[0]
    if problem.benchmark == "mbpp":
        return code
    joint = "\n\n" if _defines(code, problem.names[0]) else ""
    return problem.text + joint + code


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async )?(?:def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Text before the first of `stops`."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes: 1 − C(n−c, k) / C(n, k).

    Args:
        num_samples: n >= k.
        num_passed: c, in [0, n].
    Raises:
        ValueError: numbers outside these ranges.
    Source: arXiv 2107.03374, equation 1; exact integers instead of its product of floats.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(
            f"pass@k needs 1 <= k <= samples and 0 <= passed <= samples, got k={k}, samples={num_samples}, "
            f"passed={num_passed}."
        )
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Answer:
    """One completion of a problem.

    Args:
        problem: what was asked.
        sample: number of the completion among those of the problem, from 0.
        completion: what the generator wrote.
        program: what is executed.
    """

    problem: Problem
    sample: int
    completion: str
    program: str


def evaluate_code(
    generate: Any,
    source: str | Path | Sequence[Problem],
    *,
    allow_execution: bool = False,
    require_isolation: bool = True,
    style: str = "base",
    num_samples: int = 1,
    ks: tuple[int, ...] = (1,),
    few_shot: int | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    generation: dict | None = None,
    limits: Limits | None = None,
    workers: int = 1,
    completions_file: str | Path | None = None,
    on_progress: Progress | None = None,
) -> dict:
    """Generate solutions, execute them in the sandbox, and count.

    Args:
        generate: callable from a list of prompts to a list of completions (without the prompt), or a `PrismPipeline`.
        source: see `load_problems`, or a list of `Problem`s.
        allow_execution: must be True: programs written by a model are executed.
        require_isolation: False executes programs without isolation, but only on a machine that allows no isolation.
        style, few_shot, split, limit: see `choose`; a pipeline applies its chat template for "instruct".
        num_samples, batch_size, seed, generation: see `complete`.
        ks: the k of pass@k, each at most `num_samples`.
        limits, workers, completions_file: see `execute`.
        on_progress: called as `on_progress(stage, done, total)`, stage "generate" or "execute".
    Returns:
        JSON-able: `pass_at_k` ({"1": {"value", "interval"}}, 95 %, see `estimate`), `syntax_valid` (share that
        compiles), `outcomes` and `errors` (counts over samples), the settings, and `samples` (one object each: task_id,
        sample, completion, program, outcome, error, detail, seconds).
    Raises:
        ValueError: execution not allowed; bad settings; a problem file in another format; completions that hold mask or
            special tokens, are not as many as the prompts, or are all empty.
        SandboxUnavailable: no isolation on this machine and `require_isolation`.
        OSError: the machine failed while programs were executed, so there is no result.
    """
    check_settings(allow_execution, style, num_samples, batch_size, workers, ks)
    if generation is not None and not hasattr(generate, "scheduler"):
        raise ValueError("`generation` holds arguments of a pipeline's call, but `generate` is a plain callable.")
    isolated, limits = is_isolated(require_isolation), limits or Limits()
    chosen, examples, partial = choose(source, style, few_shot, split, limit)
    answers = complete(generate, chosen, examples, style, num_samples, batch_size, seed, generation or {}, on_progress)
    verdicts = execute(answers, limits, isolated, workers, completions_file, on_progress)
    settings = {"benchmark": chosen[0].benchmark, "style": style, "problems": len(chosen), "partial": partial}
    settings |= {"num_samples": num_samples, "few_shot": len(examples), "seed": seed}
    plain = (str, int, float, type(None))
    settings["generation"] = {name: value for name, value in (generation or {}).items() if isinstance(value, plain)}
    return settings | {"isolated": isolated, "limits": asdict(limits)} | summarise(answers, verdicts, num_samples, ks)


def check_settings(
    allow_execution: bool, style: str, num_samples: int, batch_size: int, workers: int, ks: tuple[int, ...]
) -> None:
    """Raise a ValueError for a setting of `evaluate_code` that cannot be used."""
    if allow_execution is not True:
        raise ValueError(
            "Evaluating code executes programs that a model wrote. Pass allow_execution=True to agree; they run in a "
            "sandbox (docs/evaluation_code.md)."
        )
    require(style in ("base", "instruct"), "style", style, "'base' or 'instruct'")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("workers", workers)):
        require(is_int(value, 1), name, value, "a whole number of at least 1")
    allowed = f"whole numbers from 1 to num_samples = {num_samples}"
    require(bool(ks) and all(is_int(k, 1, num_samples) for k in ks), "ks", ks, allowed)


def is_isolated(required: bool) -> bool:
    """Can programs be isolated on this machine?

    Raises:
        SandboxUnavailable: they cannot, and it is required.
    """
    problem = isolation_problem()
    if problem and required:
        raise SandboxUnavailable(f"{problem} To run without isolation all the same: require_isolation=False.")
    return problem is None


def choose(
    source: str | Path | Sequence[Problem], style: str, few_shot: int | None, split: str, limit: int | None
) -> tuple[list[Problem], list[Problem], bool]:
    """Problems to evaluate, examples to show, and whether a part of the split is left out.

    Args:
        source: see `load_problems`, or a list of `Problem`s.
        style: "base" (continues text) or "instruct" (answers a message).
        few_shot: MBPP's worked examples, tasks 2, 3, 4 of the same file; default 3 for base (as published), else 0.
        split: "test" (MBPP: task ids 11 to 510) or "all" (MBPP: all but the examples shown).
        limit: evaluate only the first `limit` problems.
    Raises:
        ValueError: a bad setting, or no problem is left.
    """
    problems = load_problems(source) if isinstance(source, (str, Path)) else list(source)
    if not problems or not all(isinstance(p, Problem) for p in problems):
        raise ValueError("`source` must be a file, a Hub id or a non-empty list of `Problem`s (see `load_problems`).")
    require(split in ("test", "all"), "split", split, "'test' or 'all'")
    benchmark = problems[0].benchmark
    shots = SHOTS[benchmark, style] if few_shot is None else few_shot
    most = len(MBPP_SHOTS) if benchmark == "mbpp" else 0
    require(is_int(shots, 0, most), "few_shot", few_shot, f"from 0 to {most} for {benchmark}")
    by_id = {p.task_id: p for p in problems}
    wanted = [str(i) for i in MBPP_SHOTS[:shots]]
    missing = [i for i in wanted if i not in by_id]
    if missing:
        raise ValueError(
            f"few_shot={shots} shows MBPP's tasks {', '.join(wanted)}, but the file lacks {', '.join(missing)}. "
            "Give the whole file, or few_shot=0 (which is not the published setting)."
        )
    examples = [by_id[i] for i in wanted]
    if benchmark == "mbpp" and split == "test":
        problems = [p for p in problems if p.task_id.isdecimal() and int(p.task_id) in MBPP_TEST]
        if not problems:
            raise ValueError(
                "No problem of MBPP's test split (task ids 11 to 510) is in the file. For others: split='all'."
            )
    problems = [p for p in problems if p not in examples]
    require(limit is None or is_int(limit, 1), "limit", limit, "a whole number of at least 1")
    chosen = problems[:limit]
    if not chosen:
        raise ValueError("No problem is left besides the examples that are shown.")
    return chosen, examples, len(chosen) < len(problems)


def complete(
    generate: Any,
    chosen: list[Problem],
    examples: list[Problem],
    style: str,
    num_samples: int,
    batch_size: int,
    seed: int,
    generation: dict,
    on_progress: Progress | None = None,
) -> list[Answer]:
    """Answers to the problems, in order. The samples of a problem are next to each other.

    Args:
        generate: as `evaluate_code`.
        chosen, examples, style: see `choose`.
        num_samples: completions of each problem; equal prompts go into a batch together.
        batch_size: prompts per call of `generate`.
        seed: of a pipeline's sampling; each (problem, sample) has its own generator, so batches do not matter.
        generation: arguments of the pipeline's call (gen_length, num_inference_steps, block_length, temperature, ...).
        on_progress: as `evaluate_code`.
    Raises:
        ValueError: the completions are not a list of finished texts, or are all empty.
    """
    asked = [(problem, sample) for problem in chosen for sample in range(num_samples)]
    special = SPECIAL
    if hasattr(generate, "scheduler"):
        special = tuple(dict.fromkeys([*SPECIAL, *getattr(generate.tokenizer, "all_special_tokens", ())]))
    answers: list[Answer] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        prompts = [build_prompt(problem, style, examples) for problem, _ in batch]
        if hasattr(generate, "scheduler"):
            streams = [
                torch.Generator().manual_seed(zlib.crc32(f"{problem.task_id} {sample} {seed}".encode()))
                for problem, sample in batch
            ]
            settings = {"generator": streams, "use_chat_template": style == "instruct", **generation}
            texts = list(generate(prompts, **settings).texts)
        else:
            texts = generate(prompts)
        check_completions(texts, [problem for problem, _ in batch], style, special)
        answers += [
            Answer(problem, sample, text, build_program(problem, style, text))
            for (problem, sample), text in zip(batch, texts, strict=True)
        ]
        if on_progress is not None:
            on_progress("generate", len(answers), len(asked))
    if not any(answer.completion.strip() for answer in answers):
        raise ValueError(f"All {len(answers)} completions are empty: is `generate` returning only the new text?")
    return answers


def check_completions(texts: object, problems: list[Problem], style: str, special: tuple[str, ...]) -> None:
    """Raise a ValueError if `texts` are not finished completions of the problems, one for each."""
    if not isinstance(texts, (list, tuple)) or len(texts) != len(problems):
        got = f"{len(texts)} of them" if isinstance(texts, (list, tuple)) else f"a {type(texts).__name__}"
        raise ValueError(f"`generate` must return a list of {len(problems)} completions, got {got}.")
    for text, problem in zip(texts, problems, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"`generate` must return text, got a {type(text).__name__} for {problem.task_id}.")
        stops = STOPS[problem.benchmark] if style == "base" else ()
        if found := [token for token in special if token in cut(text, stops)]:
            raise ValueError(
                f"The completion for {problem.task_id} holds the special token {found[0]!r}: it is unfinished, or was "
                "decoded with its special tokens. Cut it at its end token and decode with skip_special_tokens=True."
            )


def execute(
    answers: list[Answer],
    limits: Limits,
    isolated: bool,
    workers: int,
    completions_file: str | Path | None = None,
    on_progress: Progress | None = None,
) -> list[Verdict]:
    """The verdict on each program, run against the tests of its problem.

    Args:
        answers: of `complete`.
        limits: of one run.
        isolated: False runs them with limits, but without isolation.
        workers: programs executed at a time.
        completions_file: JSON Lines with task_id, sample, completion, written before the first program runs, so that
            none is lost if executing fails. None for no such file.
        on_progress: as `evaluate_code`.
    Raises:
        OSError: the machine failed, so nothing is known about the programs.
    """
    if completions_file is not None:
        rows = [{"task_id": a.problem.task_id, "sample": a.sample, "completion": a.completion} for a in answers]
        write_atomically(completions_file, "".join(json.dumps(row) + "\n" for row in rows))

    def run(answer: Answer) -> Verdict:
        problem = answer.problem
        return run_tests(
            answer.program,
            problem.tests,
            names=problem.names,
            context=problem.context,
            limits=limits,
            isolated=isolated,
        )

    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(run, answers)
        for _ in answers:
            try:
                verdicts.append(next(results))
            except (SandboxUnavailable, OSError) as error:
                kept = "" if completions_file is None else f" The completions are in {completions_file}."
                done = f"{len(verdicts)} of {len(answers)} programs"
                raise OSError(f"The machine failed after {done} ({error}).{kept}") from error
            if on_progress is not None:
                on_progress("execute", len(verdicts), len(answers))
    return verdicts


def summarise(answers: list[Answer], verdicts: list[Verdict], num_samples: int, ks: tuple[int, ...]) -> dict:
    """The counts and the samples in the result of `evaluate_code`."""
    passed = np.array([verdict.passed for verdict in verdicts]).reshape(-1, num_samples).sum(axis=1)
    compiled = [
        not (v.outcome == "syntax" or (v.outcome == "died" and v.detail.endswith("its syntax"))) for v in verdicts
    ]
    return {
        "pass_at_k": {str(k): estimate(passed, num_samples, k) for k in ks},
        "syntax_valid": sum(compiled) / len(compiled),
        "empty": sum(not answer.completion.strip() for answer in answers),
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
        "errors": dict(Counter(verdict.error for verdict in verdicts if verdict.error).most_common()),
        "samples": [
            {
                "task_id": answer.problem.task_id,
                "sample": answer.sample,
                "completion": answer.completion,
                "program": answer.program,
                **asdict(verdict),
            }
            for answer, verdict in zip(answers, verdicts, strict=True)
        ],
    }


def estimate(passed: ArrayLike, num_samples: int, k: int) -> dict:
    """Mean of pass@k over problems with its 95 % interval.

    The interval is Wilson's for one sample per problem, and if pass@k is 0 for all problems or 1 for all: there a
    bootstrap has no width. Else it is a bootstrap (10,000 resamples of problems, fixed seed).

    Args:
        passed: for each problem, how many of its samples passed.
        num_samples: samples of each problem.
        k: 1 to `num_samples`.
    Returns:
        {"value", "interval": [low, high]}; the interval is None for a single problem.
    """
    each = np.array([pass_at_k(num_samples, int(c), k) for c in np.asarray(passed)])
    if len(each) == 1:
        return {"value": float(each[0]), "interval": None}
    if num_samples == 1 or each.sum() in (0, len(each)):
        return {"value": float(each.mean()), "interval": list(wilson_interval(int(each.sum()), len(each)))}
    return {"value": float(each.mean()), "interval": list(bootstrap_interval(each) or ())}
