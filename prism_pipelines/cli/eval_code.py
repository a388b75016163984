"""`prism eval code`: HumanEval or MBPP, executed in a sandbox."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from .arguments import COUNT, Commands, add_command, show, values
from .loading import add_eval_flags, load_bundled_or, scheduler_facts, steps_within


def add_parser(kinds: Commands) -> None:
    """Add `code` to the subparsers of `prism eval`."""
    parser = add_command(
        kinds,
        "code",
        run,
        "--model MODEL --problems FILE --allow-execution [FLAGS]",
        help="HumanEval or MBPP: pass@k, executed in a sandbox",
        description="Complete the problems of HumanEval or MBPP, run what comes out in a sandbox, and print pass@k.",
        examples="""
            prism eval code --model MODEL --problems humaneval --allow-execution
            prism eval code --model MODEL --problems mbpp.jsonl --style instruct --allow-execution --workers 4""",
    )
    parser.add_argument(
        "--problems", metavar="FILE", required=True, help="of HumanEval or MBPP; or humaneval, mbpp, a Hub id"
    )
    parser.add_argument("--allow-execution", action="store_true", help="yes, run what the model writes")
    parser.add_argument("--no-isolation", action="store_true", help="also where the machine allows no isolation")
    parser.add_argument("--style", choices=["base", "instruct"], default="base", help="default: base")
    parser.add_argument("--split", choices=["test", "all"], default="test", help="of MBPP (default: test)")
    parser.add_argument(
        "--few-shot", metavar="N", type=int, help="examples shown, for MBPP 0 to 3 (default: as published)"
    )
    parser.add_argument("--limit", metavar="N", type=COUNT, help="the first problems only; the result says so")
    parser.add_argument("--num-samples", metavar="N", type=COUNT, default=1, help="of each problem (default: 1)")
    parser.add_argument("--pass-at", metavar="K", type=COUNT, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--gen-length", metavar="N", type=COUNT, default=512, help="default: 512")
    parser.add_argument("--block-length", metavar="N", type=COUNT, default=32, help="default: 32")
    parser.add_argument("--forwards", metavar="N", type=COUNT, default=256, help="forward passes (default: 256)")
    parser.add_argument("--batch-size", metavar="N", type=COUNT, default=8, help="prompts at a time (default: 8)")
    parser.add_argument("--workers", metavar="N", type=COUNT, default=1, help="programs run at a time (default: 1)")
    parser.add_argument("--out", metavar="FILE", help="write everything as JSON; completions before programs run")
    add_eval_flags(parser, "needed: the bundled models write no code")


def run(args: argparse.Namespace) -> int:
    """pass@k of a model on a file of problems. Returns the exit status."""
    from ..atomic_files import write_atomically
    from ..evaluation.code.sandbox import isolation_problem
    from ..evaluation.code.tasks import evaluate_code

    if args.model is None:
        raise ValueError("Pass --model: the bundled model writes no code.")
    if not args.allow_execution:
        raise ValueError("This executes programs that the model writes, in a sandbox. Say so with --allow-execution.")
    if not args.no_isolation and (reason := isolation_problem()):
        raise ValueError(f"This machine cannot isolate programs: {reason} --no-isolation runs them all the same.")
    if args.out is not None and (Path(args.out).is_dir() or not Path(args.out).absolute().parent.is_dir()):
        raise ValueError(f"--out {args.out}: that folder does not exist, or it is a folder itself.")
    pipe = load_bundled_or(args, "sudoku")
    steps = values(args, "gen_length", "block_length")
    steps["num_inference_steps"] = steps_within(args.forwards, pipe, math.ceil(args.gen_length / args.block_length))
    how = values(args, "style", "num_samples", "few_shot", "split", "limit", "batch_size", "workers", "seed")
    result = evaluate_code(
        pipe,
        args.problems,
        allow_execution=True,
        require_isolation=not args.no_isolation,
        ks=tuple(args.pass_at),
        generation=steps,
        completions_file=None if args.out is None else Path(args.out).with_suffix(".completions.jsonl"),
        **how,
    )
    result |= scheduler_facts(pipe)
    if args.out is not None:
        write_atomically(args.out, json.dumps(result, indent=1) + "\n")
    return show({name: value for name, value in result.items() if name != "samples"}, args)
