"""`prism eval sudoku|text|code|calibration|compare`: `prism_pipelines.evaluation` on the command line."""

from __future__ import annotations

import argparse
import json
import sys

# What `compare` compares when no file says otherwise: the same order and number of remasked tokens for every rule.
ARMS = [
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "PRISM", "scheduler": "PrismScheduler", "order": "random", "num_remask": 4},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "num_remask": 4},
    {"name": "ReMDM-cap", "scheduler": "ReMDMScheduler", "strategy": "cap", "eta": 0.04},
]


def add_parser(commands) -> None:
    """Add the subcommand `eval` to the subparsers of `prism`."""
    parser = commands.add_parser("eval", help="measure a model: sudoku, text, calibration, compare")
    kinds = parser.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)

    sudoku = kinds.add_parser("sudoku", help="share of puzzles solved, with its interval")
    _common(sudoku, run_sudoku)
    sudoku.add_argument("--steps", type=int, default=52, help="forward passes (default: %(default)s)")
    sudoku.add_argument("--num-puzzles", type=int, default=100)
    sudoku.add_argument("--clues", type=int, default=30, help="clues of each puzzle, 17 to 80 (default: %(default)s)")

    text = kinds.add_parser("text", help="distances to held-out text, diversity, perplexity under a judge, MAUVE")
    _common(text, run_text)
    text.add_argument("--texts", metavar="FILE", help="generated texts (.jsonl, .json, .txt); default: generate")
    text.add_argument("--reference", metavar="FILE", required=True, help="held-out texts, in the same formats")
    text.add_argument("--num-samples", type=int, default=64)
    text.add_argument("--gen-length", type=int, default=128)
    text.add_argument("--steps", type=int, default=64, help="forward passes (default: %(default)s)")
    text.add_argument("--judge", help="folder or Hub id of a causal model, for generative perplexity")
    text.add_argument("--featurizer", help="folder or Hub id of a model, for MAUVE")

    calibration = kinds.add_parser("calibration", help="does the head know what is wrong? AUROC, ECE, Brier, figure")
    _common(calibration, run_calibration)
    calibration.add_argument("--data", default="sudoku", help='"sudoku" or a file of texts (default: %(default)s)')
    calibration.add_argument("--num-sequences", type=int, default=256)
    calibration.add_argument("--length", type=int, default=128, help="tokens of a sequence of text")
    calibration.add_argument("--num-revealed", type=int, default=1, help="tokens planted at once (default: 1)")
    calibration.add_argument("--out", metavar="FOLDER", help="write calibration.json, .md and .png there")

    code = kinds.add_parser("code", help="HumanEval or MBPP: pass@k, executed in a sandbox")
    _common(code, run_code)
    code.add_argument("--problems", required=True, help="file of HumanEval or MBPP, or humaneval, mbpp, a Hub id")
    code.add_argument("--allow-execution", action="store_true", help="yes, run what the model writes")
    code.add_argument("--no-isolation", action="store_true", help="also where the machine allows no isolation")
    code.add_argument("--style", choices=["base", "instruct"], default="base")
    code.add_argument("--num-samples", type=int, default=1, help="completions of each problem")
    code.add_argument("--pass-at", type=int, nargs="+", default=[1], metavar="K")
    code.add_argument("--limit", type=int, help="the first problems only; the result says that it is partial")
    code.add_argument("--gen-length", type=int, default=512)
    code.add_argument("--block-length", type=int, default=32)
    code.add_argument("--steps", type=int, default=256, help="forward passes (default: %(default)s)")
    code.add_argument("--out", metavar="FILE", help="write everything, with programs and verdicts, as JSON")

    compare = kinds.add_parser("compare", help="arms by forwards by seeds at equal forwards, resumable")
    _common(compare, run_compare)
    compare.add_argument("--config", metavar="FILE", help=".json or .toml: arms, forwards, seeds, temperature")
    compare.add_argument("--task", choices=["sudoku", "text", "all"], help="default: sudoku; without --model all")
    compare.add_argument("--reference", metavar="FILE", help="held-out texts (default: those beside the text model)")
    compare.add_argument("--forwards", type=int, nargs="+", help="default: 16 52 for sudoku, 16 32 64 for text")
    compare.add_argument("--num-seeds", type=int, help="default: 3 for sudoku, 5 for text")
    compare.add_argument("--num-puzzles", type=int, default=100)
    compare.add_argument("--clues", type=int, default=30)
    compare.add_argument("--num-samples", type=int, default=64)
    compare.add_argument("--gen-length", type=int, help="tokens of a text (default: what fits, at most 256)")
    compare.add_argument("--quick", action="store_true", help="few seeds, puzzles and texts: minutes")
    compare.add_argument("--out", metavar="FOLDER", default="runs/compare", help="default: %(default)s")


def _common(parser, run) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: a bundled model)")
    parser.add_argument("--quality-head", metavar="HEAD", help="folder or Hub id of a head for it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def _pipeline(args, default: str = "sudoku"):
    """The pipeline of `--model`, or the bundled one of this name."""
    from . import bundled
    from .pipeline_prism import PrismPipeline

    pipe = PrismPipeline.from_pretrained(args.model or bundled(default), quality_head=args.quality_head)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def _print(result: dict, args: argparse.Namespace, text: str | None = None) -> int:
    if args.json:
        print(json.dumps(result))
    elif text is not None:
        print(text)
    else:
        for name, value in result.items():
            print(f"{name:20}{value:.4g}" if isinstance(value, float) else f"{name:20}{json.dumps(value)}")
    return 0


def run_sudoku(args: argparse.Namespace) -> int:
    """Share of generated puzzles that the model solves. Returns the exit status."""
    from . import evaluation, sudoku

    puzzles, _ = sudoku.make_puzzles(args.num_puzzles, args.clues, seed=args.seed)
    score = evaluation.evaluate_sudoku(evaluation.pipeline_solver(_pipeline(args), args.steps, args.seed), puzzles)
    low, high = evaluation.wilson_interval(int(score.solved.sum()), len(puzzles))
    result = {"solved": score.success, "low": low, "high": high, "puzzles": len(puzzles), "clues": args.clues}
    return _print(result | {"forwards": args.steps, "seed": args.seed}, args)


def run_text(args: argparse.Namespace) -> int:
    """Every measure of generated text that the flags allow. Returns the exit status."""
    from . import evaluation

    if args.texts is None and args.model is None:
        raise ValueError("Pass --texts FILE with generated texts, or --model to generate them.")
    if args.texts is not None:
        texts = evaluation.read_texts(args.texts)
    else:
        texts = evaluation.pipeline_texts(_pipeline(args), args.num_samples, args.gen_length, args.steps, args.seed)
        texts = texts[0] if isinstance(texts, tuple) else texts
    reference = evaluation.read_texts(args.reference)
    result = evaluation.evaluate_text(
        texts, reference, judge=args.judge, featurizer=args.featurizer, device=args.device
    )
    return _print(result, args)


def run_code(args: argparse.Namespace) -> int:
    """pass@k of a model on a file of problems. Returns the exit status."""
    from pathlib import Path

    from .evaluation.code import evaluate_code
    from .evaluation.sandbox import isolation_problem

    if args.model is None:
        raise ValueError("Pass --model: the bundled model writes no code.")
    if not args.allow_execution:
        raise ValueError("This executes programs that the model writes, in a sandbox. Say so with --allow-execution.")
    if not args.no_isolation and (reason := isolation_problem()):
        raise ValueError(f"This machine cannot isolate programs: {reason} --no-isolation runs them all the same.")
    steps = {"num_inference_steps": args.steps, "gen_length": args.gen_length, "block_length": args.block_length}
    result = evaluate_code(
        _pipeline(args),
        args.problems,
        allow_execution=True,
        require_isolation=not args.no_isolation,
        style=args.style,
        num_samples=args.num_samples,
        ks=tuple(args.pass_at),
        limit=args.limit,
        seed=args.seed,
        generation=steps,
    )
    if args.out is not None:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return _print({name: value for name, value in result.items() if name != "samples"}, args)


def run_calibration(args: argparse.Namespace) -> int:
    """Calibration of the head and of the backbone's own probability. Returns the exit status."""
    import torch

    from . import evaluation, sudoku

    pipe = _pipeline(args)
    if args.data == "sudoku":
        sequences = torch.as_tensor(sudoku.make_puzzles(args.num_sequences, 36, seed=args.seed)[1]).long()
    else:
        sequences = packed(evaluation.read_texts(args.data), pipe.tokenizer, args.length, args.num_sequences)
    result = evaluation.evaluate_calibration(
        pipe, sequences, num_revealed=args.num_revealed, seed=args.seed, out_dir=args.out
    )
    return _print(result, args, evaluation.calibration_table(result))


def packed(texts: list[str], tokenizer, length: int, count: int):
    """The first `count` sequences of `length` tokens of texts laid end to end, int64 (N, length).

    Raises:
        ValueError: no tokenizer, or less text than one sequence.
    """
    import torch

    if tokenizer is None:
        raise ValueError("The model has no tokenizer, so text cannot be read; pass --data sudoku or another model.")
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    count = min(count, len(ids) // length)
    if count == 0:
        raise ValueError(f"--data holds {len(ids)} tokens, less than one sequence of --length {length}.")
    return torch.tensor(ids[: count * length]).view(count, length)


def run_compare(args: argparse.Namespace) -> int:
    """Arms at equal forwards, with intervals and a figure; of both bundled models if none is named.

    Returns the exit status.
    """
    task = args.task or ("sudoku" if args.model or args.config else "all")
    if task == "all" and (args.model or args.config or args.quality_head):
        raise ValueError(
            "--task all is for the bundled models at their own arms; name one task with --model or --config."
        )
    from . import evaluation

    kinds, results = ["sudoku", "text"] if task == "all" else [task], {}
    for kind in kinds:
        out = f"{args.out}/{kind}" if task == "all" else args.out
        pipe, compared, plan, name = (_compare_sudoku if kind == "sudoku" else _compare_text)(args)
        if args.config is not None:
            kept = {field: plan[field] for field in ("quality", "higher_is_better") if field in plan}
            plan = kept | evaluation.read_comparison(args.config)
        if args.forwards is not None:
            plan["forwards"] = args.forwards
        if args.num_seeds is not None:
            plan["seeds"] = list(range(args.num_seeds))
        if args.quick:
            plan["seeds"] = plan["seeds"][: 1 if kind == "sudoku" else 2]
        print(f"{kind}: {len(plan['arms'])} arms at {plan['forwards']} forwards", file=sys.stderr)
        results[kind] = evaluation.run_comparison(pipe, compared, out_dir=out, task_name=name, **plan)
        print(f"table and figure of {kind} are in {out}", file=sys.stderr)
    text = "\n".join(evaluation.comparison_table(result) for result in results.values())
    return _print(results if task == "all" else results[task], args, text)


def _compare_sudoku(args):
    """Pipeline, task, plan and name of a comparison on generated puzzles."""
    from . import evaluation, sudoku

    puzzles, _ = sudoku.make_puzzles(20 if args.quick else args.num_puzzles, args.clues, seed=args.seed)
    name = f"{_named(args, 'sudoku')} sudoku-{len(puzzles)}-{args.clues}-{args.seed}"
    plan = {"arms": ARMS, "forwards": [16, 52], "seeds": [0, 1, 2]}
    return _pipeline(args), evaluation.sudoku_task(puzzles), plan, name


def _compare_text(args):
    """Pipeline, task, plan and name of a comparison by text written from nothing."""
    from . import bundled, evaluation
    from .cli_text import room

    folder, count, pipe = args.model or bundled("text"), 16 if args.quick else args.num_samples, _pipeline(args, "text")
    length = room(pipe, None, args.gen_length)
    task = evaluation.task_of_folder(folder, args.reference, num_samples=count, gen_length=length)
    return pipe, task, evaluation.text_plan(folder), f"{_named(args, 'text')} {count}-{length}"


def _named(args, default: str) -> str:
    """What a finished cell is found again by."""
    return f"{args.model or f'bundled {default}'} {args.quality_head or ''}"
