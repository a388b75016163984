"""`prism eval sudoku|text|calibration|code|compare`: `prism_pipelines.evaluation` on the command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

from .arguments import check_device, number_type

# Puzzles and noise that settings are chosen on begin this far from those they are compared on.
TUNE_SEED = 500_000
TRIALS = 8  # of an arm that has settings to choose from
BUNDLED = "default: the bundled model for the task"


def add_parser(commands) -> None:
    """Add the subcommand `eval` to the subparsers of `prism`."""
    parser = commands.add_parser("eval", help="measure a model: sudoku, text, calibration, code, compare")
    kinds = parser.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)

    count = number_type(int, 1, "a whole number of at least 1")

    sudoku = kinds.add_parser("sudoku", help="share of puzzles solved, with its interval")
    _common(sudoku, run_sudoku, BUNDLED)
    _sampling(sudoku)
    sudoku.add_argument("--steps", type=count, default=52, help="forward passes (default: %(default)s)")
    sudoku.add_argument("--num-puzzles", type=count, default=100)
    sudoku.add_argument("--clues", type=int, default=30, help="clues of each puzzle, 20 to 81 (default: %(default)s)")
    sudoku.add_argument(
        "--risk-coverage",
        action="store_true",
        help="share of wrong grids among the surest tenth, fifth, ... of them; needs a calibrated head",
    )

    text = kinds.add_parser("text", help="distances to held-out text, diversity, perplexity under a judge, MAUVE")
    _common(text, run_text, "it writes the texts; or pass --texts")
    _sampling(text)
    text.add_argument("--texts", metavar="FILE", help="generated texts (.jsonl, .json, .txt), in place of --model")
    text.add_argument("--reference", metavar="FILE", required=True, help="held-out texts, in the same formats")
    text.add_argument("--num-samples", type=count, help="texts to generate (default: 64)")
    text.add_argument("--gen-length", type=count, help="tokens of each (default: 128)")
    text.add_argument("--steps", type=count, help="forward passes (default: 64)")
    text.add_argument("--words", metavar="FILE", help="known words, between blanks (default: those of --reference)")
    text.add_argument("--judge", help="folder or Hub id of a causal model, for generative perplexity")
    text.add_argument("--ngram-judge", metavar="FILE", help="or texts to count a 6-gram judge of bytes in: no download")
    text.add_argument("--featurizer", help="folder or Hub id of a model, for MAUVE")

    calibration = kinds.add_parser("calibration", help="does the head know what is wrong? AUROC, ECE, Brier, figure")
    _common(calibration, run_calibration, BUNDLED)
    calibration.add_argument("--data", default="sudoku", help='"sudoku" or a file of texts (default: %(default)s)')
    calibration.add_argument("--num-sequences", type=count, default=256)
    calibration.add_argument("--length", type=count, default=128, help="tokens of a sequence of text, at most")
    calibration.add_argument(
        "--packing",
        choices=["true", "false"],
        help="texts end to end, cut into --length (default: as in training: language models true, encoders false)",
    )
    calibration.add_argument("--num-revealed", type=count, default=1, help="tokens planted at once (default: 1)")
    calibration.add_argument("--out", metavar="FOLDER", help="write calibration.json, .md and .png there")

    code = kinds.add_parser("code", help="HumanEval or MBPP: pass@k, executed in a sandbox")
    _common(code, run_code, "needed: the bundled models write no code")
    _sampling(code)
    code.add_argument("--problems", required=True, help="file of HumanEval or MBPP, or humaneval, mbpp, a Hub id")
    code.add_argument("--allow-execution", action="store_true", help="yes, run what the model writes")
    code.add_argument("--no-isolation", action="store_true", help="also where the machine allows no isolation")
    code.add_argument("--style", choices=["base", "instruct"], default="base")
    code.add_argument("--num-samples", type=count, default=1, help="completions of each problem")
    code.add_argument("--pass-at", type=count, nargs="+", default=[1], metavar="K")
    code.add_argument("--split", choices=["test", "all"], default="test", help="of MBPP (default: %(default)s)")
    code.add_argument(
        "--few-shot", type=int, metavar="N", help="examples shown, for MBPP 0 to 3 (default: as published)"
    )
    code.add_argument("--batch-size", type=count, default=8, help="prompts at a time (default: %(default)s)")
    code.add_argument("--workers", type=count, default=1, help="programs run at a time (default: %(default)s)")
    code.add_argument("--limit", type=count, help="the first problems only; the result says that it is partial")
    code.add_argument("--gen-length", type=count, default=512)
    code.add_argument("--block-length", type=count, default=32)
    code.add_argument("--steps", type=count, default=256, help="forward passes (default: %(default)s)")
    code.add_argument("--out", metavar="FILE", help="write everything as JSON; completions before programs run")

    compare = kinds.add_parser("compare", help="arms by forwards by seeds at equal forwards, resumable")
    _common(compare, run_compare, BUNDLED)
    compare.add_argument("--config", metavar="FILE", help=".json or .toml: arms, forwards, seeds, temperature")
    compare.add_argument("--task", choices=["sudoku", "text", "all"], help="default: sudoku; without --model all")
    compare.add_argument("--reference", metavar="FILE", help="held-out texts (default: those beside the text model)")
    compare.add_argument("--forwards", type=count, nargs="+", help="default: 16 52 for sudoku, 16 32 64 for text")
    compare.add_argument("--num-seeds", type=count, help="seeds from --seed on (default: 3 for sudoku, 5 for text)")
    compare.add_argument("--puzzles", metavar="FILE", help="puzzles, one a line (default: generated ones)")
    compare.add_argument("--num-puzzles", type=count, help="default: 100")
    compare.add_argument("--clues", type=int, help="clues of each puzzle, 20 to 81 (default: 30)")
    compare.add_argument("--num-samples", type=count, help="texts to generate (default: 64)")
    compare.add_argument("--gen-length", type=count, help="tokens of a text (default: what fits, at most 256)")
    compare.add_argument("--trials", type=count, help=f"settings tried of each arm with lists (default: {TRIALS})")
    compare.add_argument("--tune-steps", type=count, help="forwards to try them at (default: the middle of --forwards)")
    compare.add_argument("--tune-reference", metavar="FILE", help="other held-out texts, to try them on")
    compare.add_argument("--quick", action="store_true", help="few seeds, puzzles and texts: minutes")
    compare.add_argument("--out", metavar="FOLDER", default="runs/compare", help="default: %(default)s")


def _common(parser, run, model: str) -> None:
    parser.add_argument("--model", help=f"folder or Hub id ({model})")
    parser.add_argument("--quality-head", metavar="HEAD", help="folder or Hub id of a head for it")
    parser.add_argument("--seed", type=number_type(int, 0, "a whole number of at least 0"), default=0)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def _sampling(parser) -> None:
    parser.add_argument("--scheduler", metavar="NAME", help="such as SelfConfidenceScheduler (default: the model's)")
    parser.add_argument(
        "--scheduler-config",
        metavar="JSON",
        help='fields to set in it, such as \'{"num_remask": 4, "temperature": 0}\'',
    )


def _pipeline(args, default: str = "sudoku"):
    """The pipeline of `--model`, or the bundled one of this name."""
    from .. import bundled
    from ..pipeline_prism import PrismPipeline

    device = check_device(args.device)
    pipe = PrismPipeline.from_pretrained(args.model or bundled(default), quality_head=args.quality_head)
    pipe.set_progress_bar_config(disable=True)
    name, fields = getattr(args, "scheduler", None), getattr(args, "scheduler_config", None)
    if name is not None or fields is not None:
        from ..schedulers.by_name import change_scheduler

        pipe.scheduler = change_scheduler(pipe.scheduler, name, fields)
    return pipe.to(device)


def _rule(pipe) -> dict:
    """The scheduler that a result was made with, and its fields."""
    from ..schedulers.validation import own_fields

    return {"scheduler": {"name": type(pipe.scheduler).__name__, **own_fields(pipe.scheduler)}}


def _steps(steps: int, pipe, blocks: int = 1) -> int:
    """`num_inference_steps` that make `--steps` forwards: those of a refinement loop come on top, in every block."""
    from ..schedulers.validation import loop_steps

    loop = blocks * loop_steps(pipe.scheduler)
    if loop and steps <= loop:
        raise ValueError(f"--steps {steps} must be more than the {loop} forwards of the scheduler's loop_steps.")
    return steps - loop


def _refuse(args, flags: tuple[str, ...], why: str) -> None:
    """Name the first of these flags that was given."""
    for flag in flags:
        if getattr(args, flag[2:].replace("-", "_")) not in (None, 0):
            raise ValueError(f"{flag} has no effect {why}: leave it out.")


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
    import numpy as np

    from .. import evaluation, sudoku
    from ..schedulers import JudgeAndRepairScheduler

    pipe, outputs = _pipeline(args), []
    if args.risk_coverage:
        _check_calibrated(pipe)
    # The forward that judges the result counts; judge and repair makes its own.
    looks = args.risk_coverage and not isinstance(pipe.scheduler, JudgeAndRepairScheduler)
    steps = _steps(args.steps, pipe) - looks
    if steps < 1:
        raise ValueError("--steps 1 leaves no forward to fill the grid, since --risk-coverage judges in one.")
    puzzles, _ = sudoku.make_puzzles(args.num_puzzles, args.clues, seed=args.seed)
    solve = evaluation.pipeline_solver(pipe, steps, args.seed, outputs.append, looks)
    score = evaluation.evaluate_sudoku(solve, puzzles)
    low, high = score.interval
    result = {"solved": score.success, "low": low, "high": high, "puzzles": len(puzzles), "clues": args.clues}
    nfe = [count for out in outputs for count in out.nfe_per_row]
    result |= {"forwards": args.steps, "mean_forwards": float(np.mean(nfe)), "seed": args.seed}
    if outputs[0].accepted is not None:
        accepted = np.concatenate([out.accepted.cpu().numpy() for out in outputs])
        result |= {"accepted": int(accepted.sum()), "accepted_right": int((accepted & score.solved).sum())}
    if args.risk_coverage:
        confidence = np.concatenate([out.confidence.cpu().numpy() for out in outputs])
        result |= _risk_at_tenths(evaluation.risk_coverage(confidence, score.solved))
    return _print(result | _rule(pipe), args)


def _check_calibrated(pipe) -> None:
    """Raise a ValueError where the pipeline can say nothing of how sure it is."""
    if pipe.quality_head is None or pipe.quality_head.config.get("temperature") is None:
        found = "no quality head" if pipe.quality_head is None else "a quality head without a fitted temperature"
        raise ValueError(
            f"--risk-coverage needs a calibrated quality head, and the model has {found}: see fit_temperature."
        )


def _risk_at_tenths(curve: dict) -> dict:
    """Share of wrong answers among the surest tenth, two tenths, ... of them, and the area, of `risk_coverage`."""
    count = len(curve["risk"])
    risk = {f"{tenth}0 %": curve["risk"][math.ceil(tenth * count / 10) - 1] for tenth in range(1, 11)}
    return {"risk": risk, "risk_area": curve["area"]}


def run_text(args: argparse.Namespace) -> int:
    """Every measure of generated text that the flags allow. Returns the exit status."""
    from .. import evaluation
    from ..evaluation.text_models import check_mauve

    if args.texts is None and args.model is None:
        raise ValueError("Pass --texts FILE with generated texts, or --model to generate them.")
    if args.texts is not None:
        of_model = ("--model", "--quality-head", "--num-samples", "--gen-length", "--steps", "--seed")
        _refuse(args, (*of_model, "--scheduler", "--scheduler-config"), "on --texts")
    if args.judge is not None and args.ngram_judge is not None:
        raise ValueError("Pass one of --judge and --ngram-judge.")
    check_device(args.device)
    # What can be wrong with the files must not show after the texts were written.
    reference, vocabulary = evaluation.read_texts(args.reference), None
    if args.words is not None:
        vocabulary = set(Path(args.words).read_text(encoding="utf-8").lower().split())
        if not vocabulary:
            raise ValueError(f"--words {args.words} holds no words.")
    try:
        reference = evaluation.check_texts(reference, "reference")
        evaluation.evaluate_text(reference, reference, vocabulary=vocabulary)
    except ValueError as error:
        raise ValueError(f"--reference {args.reference} cannot be compared with: {error}") from error
    judge = featurizer = None
    if args.ngram_judge is not None:
        judge = _byte_judge(args.ngram_judge)
    elif args.judge is not None:
        judge = evaluation.load_judge(args.judge, device=args.device)
    count = args.num_samples or 64
    texts = None if args.texts is None else evaluation.read_texts(args.texts)
    if args.featurizer is not None:
        check_mauve(count if texts is None else len(texts), len(reference))
        featurizer = evaluation.load_featurizer(args.featurizer, device=args.device)
    rule = {}
    if texts is None:
        pipe = _pipeline(args)
        rule, length = _rule(pipe), args.gen_length or 128
        blocks = math.ceil(length / (pipe.config.mdm_spec["block_length"] or length))
        steps = _steps(args.steps or 64, pipe, blocks)
        texts = evaluation.pipeline_texts(pipe, count, length, steps, args.seed)
    result = evaluation.evaluate_text(texts, reference, vocabulary=vocabulary, judge=judge, featurizer=featurizer)
    return _print(result | rule, args)


def _byte_judge(file: str):
    """A 6-gram judge of bytes, counted in the texts of a file."""
    from transformers import AutoTokenizer

    from .. import bundled, evaluation

    tokenizer = AutoTokenizer.from_pretrained(f"{bundled('text')}/tokenizer")
    return evaluation.ngram_judge(evaluation.read_texts(file), tokenizer, n=6)


def run_code(args: argparse.Namespace) -> int:
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
    pipe = _pipeline(args)
    steps = {"gen_length": args.gen_length, "block_length": args.block_length}
    steps["num_inference_steps"] = _steps(args.steps, pipe, math.ceil(args.gen_length / args.block_length))
    result = evaluate_code(
        pipe,
        args.problems,
        allow_execution=True,
        require_isolation=not args.no_isolation,
        style=args.style,
        num_samples=args.num_samples,
        ks=tuple(args.pass_at),
        few_shot=args.few_shot,
        split=args.split,
        limit=args.limit,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        generation=steps,
        completions_file=None if args.out is None else Path(args.out).with_suffix(".completions.jsonl"),
    )
    result |= _rule(pipe)
    if args.out is not None:
        write_atomically(args.out, json.dumps(result, indent=1) + "\n")
    return _print({name: value for name, value in result.items() if name != "samples"}, args)


def run_calibration(args: argparse.Namespace) -> int:
    """Calibration of the head and of the backbone's own probability. Returns the exit status."""
    import torch

    from .. import evaluation, sudoku

    if args.data == "sudoku":
        _refuse(args, ("--packing",), "on Sudoku")
        pipe = _pipeline(args)
        if pipe.mask_token_id != sudoku.MASK_ID or getattr(pipe.model.config, "vocab_size", None) != sudoku.VOCAB_SIZE:
            raise ValueError(f"{args.model} is not a Sudoku model; pass --data FILE with texts.")
        data = {
            "input_ids": torch.as_tensor(sudoku.make_puzzles(args.num_sequences, 36, seed=args.seed)[1]).long(),
            "trainable_mask": None,
        }
    else:
        texts, pipe = evaluation.read_texts(args.data), _pipeline(args, "text")
        packing = None if args.packing is None else args.packing == "true"
        data = text_sequences(texts, pipe, args.length, args.num_sequences, packing)
    result = evaluation.evaluate_calibration(
        pipe,
        data["input_ids"],
        trainable_mask=data["trainable_mask"],
        attention_mask=data.get("attention_mask"),
        num_revealed=args.num_revealed,
        seed=args.seed,
        out_dir=args.out,
    )
    return _print(result, args, evaluation.calibration_table(result))


def text_sequences(texts: list[str], pipe, length: int, count: int, packing: bool | None = None) -> dict:
    """The first `count` sequences of texts, as training makes examples of them.

    Args:
        texts: one sequence each, or laid end to end.
        pipe: a `PrismPipeline` with a tokenizer.
        length: tokens of a packed sequence; a text that is longer, with its special tokens, is left out otherwise.
        count: most sequences.
        packing: as `--packing` in training.
    Returns:
        a batch: `input_ids` and `trainable_mask` (N, L), and `attention_mask` if anything is padded.
    Raises:
        ValueError: no tokenizer, less text than one sequence, or a tokenizer that does not know most of it.
    """
    import itertools

    import torch

    from ..models.families import supports_all_masked_input
    from ..sampling.rows import RowEncoder, encode_rows, examples_line, pad_batch

    if pipe.tokenizer is None:
        raise ValueError("The model has no tokenizer, so text cannot be read; pass --data sudoku or another model.")
    encoder = RowEncoder(
        pipe.tokenizer,
        pipe.mask_token_id,
        length,
        pipe.model.config.vocab_size,
        too_long="drop",
        suppress_tokens=tuple(pipe.denoiser.suppressed.nonzero().flatten().tolist()),
        supports_all_masked_input=supports_all_masked_input(pipe.model.config),
        frame=pipe.text_frame,
        packing=packing,
    )
    rows = [{"text": text} for text in texts]
    examples = list(itertools.islice(encode_rows(rows, encoder), count))
    if encoder.packs and examples and len(examples[0]["input_ids"]) < length:
        raise ValueError(
            f"--data holds {len(examples[0]['input_ids'])} tokens, less than one sequence of --length {length}."
        )
    if not examples:
        raise ValueError(f"--data holds no text of at most --length {length} tokens.")
    print(examples_line(rows, encoder, examples), file=sys.stderr)
    batch = pad_batch(examples, pipe.tokenizer.pad_token_id or 0)
    # Some tokenizers write padding for what they do not know.
    strange = [token for token in (pipe.tokenizer.unk_token_id, pipe.tokenizer.pad_token_id) if token is not None]
    ids = torch.cat([example["input_ids"] for example in examples])
    if (unknown := torch.isin(ids, torch.tensor(strange, dtype=torch.long)).float().mean()) > 0.5:
        raise ValueError(f"The model's tokenizer does not know {unknown:.0%} of --data: it is made for other text.")
    return batch


def run_compare(args: argparse.Namespace) -> int:
    """Arms at equal forwards, with intervals and a figure; of both bundled models if none is named.

    Returns the exit status.
    """
    task = args.task or ("sudoku" if args.model or args.config else "all")
    if task == "all" and (args.model or args.config or args.quality_head):
        raise ValueError(
            "--task all is for the bundled models at their own arms; name one task with --model or --config."
        )
    if task == "sudoku":
        _refuse(args, ("--reference", "--num-samples", "--gen-length"), "on Sudoku")
    if task == "text":
        _refuse(args, ("--puzzles", "--num-puzzles", "--clues"), "on text")
    if args.puzzles is not None:
        _refuse(args, ("--num-puzzles", "--clues"), "with --puzzles")
    if args.quick:
        _refuse(args, ("--num-puzzles", "--num-samples", "--num-seeds"), "beside --quick")
    from .. import evaluation

    kinds, results = ["sudoku", "text"] if task == "all" else [task], {}
    for kind in kinds:
        out = f"{args.out}/{kind}" if task == "all" else args.out
        pipe, compared, plan, name = (_compare_sudoku if kind == "sudoku" else _compare_text)(args)
        if args.config is not None:
            plan = _configured(args, plan, kind)
        if args.forwards is not None:
            plan["forwards"] = args.forwards
        if args.num_seeds is not None:
            plan["seeds"] = [args.seed + i for i in range(args.num_seeds)]
        if args.quick:
            plan["seeds"] = plan["seeds"][: 1 if kind == "sudoku" else 3]
        print(f"{kind}: {len(plan['arms'])} arms at {plan['forwards']} forwards", file=sys.stderr)
        plan["arms"] = _tuned(args, plan, kind, pipe, out)
        results[kind] = evaluation.run_comparison(pipe, compared, out_dir=out, task_name=name, **plan)
        print(f"table and figure of {kind} are in {out}", file=sys.stderr)
    text = "\n".join(evaluation.comparison_table(result) for result in results.values())
    return _print(results if task == "all" else results[task], args, text)


def _configured(args, plan: dict, kind: str) -> dict:
    """The plan of `--config`; of the task's own only its quality stays, where the file names no other."""
    from .. import evaluation

    fields = evaluation.read_comparison(args.config)
    if kind == "text" and args.seed and args.num_seeds is None:
        raise ValueError("--seed has no effect beside the seeds of --config; pass --num-seeds too, or leave it out.")
    kept = {field: plan[field] for field in ("quality", "higher_is_better") if field in plan}
    return (kept if fields.get("quality", plan.get("quality")) == plan.get("quality") else {}) | fields


def _tuned(args, plan: dict, kind: str, pipe, out: str) -> list[dict]:
    """The arms of the plan, those with lists at the best of the settings tried: on other puzzles or texts."""
    from .. import evaluation
    from ..evaluation.arms import check_comparison
    from ..evaluation.tuning import first_settings, knobs

    if not any(map(knobs, plan["arms"])):
        given = {"--trials": args.trials, "--tune-steps": args.tune_steps, "--tune-reference": args.tune_reference}
        if useless := [flag for flag, value in given.items() if value is not None]:
            raise ValueError(f"{useless[0]} has no effect: no arm has a list of settings to choose from (--config).")
        return plan["arms"]
    if kind == "sudoku" and args.tune_reference is not None:
        raise ValueError("--tune-reference is for text; puzzles to choose settings on are generated.")
    of_plan = plan["forwards"], plan["seeds"], plan.get("temperature", 1.0), {None: pipe}, plan.get("reference")
    check_comparison(first_settings(plan["arms"]), *of_plan)  # what it refuses must not show after the search
    if kind == "sudoku":
        task, mark = _sudoku_task(args, TUNE_SEED + args.seed)
        mark += f" [{evaluation.fingerprint(pipe)}]"
    elif args.tune_reference is None:
        raise ValueError("Lists in --config are settings to choose from, on other texts: pass --tune-reference FILE.")
    elif _share_a_text(_texts_read(args, args.tune_reference), _texts_read(args, args.reference)):
        raise ValueError("--tune-reference has a text of the texts that the result is reported on: pass others.")
    else:
        task, mark = _text_task(args, pipe, args.tune_reference)
    forwards = sorted(plan["forwards"])
    arms, _ = evaluation.tune_arms(
        pipe,
        task,
        plan["arms"],
        steps=args.tune_steps or forwards[len(forwards) // 2],
        seed=TUNE_SEED + args.seed,
        trials=args.trials or TRIALS,
        out_dir=f"{out}/tuning",
        task_name=f"{_named(args, kind)}: {mark}",
        report=lambda arm, found: print(f"tried {json.dumps(arm | found)}", file=sys.stderr),
        **{name: plan[name] for name in ("temperature", "quality", "higher_is_better") if name in plan},
    )
    return arms


def _compare_sudoku(args):
    """Pipeline, task, plan and name of a comparison on the puzzles of a file, or on generated ones."""
    from .. import evaluation
    from ..evaluation.arms import SUDOKU_ARMS
    from .sudoku import read_puzzles

    if args.puzzles is None:
        task, mark = _sudoku_task(args, args.seed)
    else:
        if not Path(args.puzzles).is_file():
            raise ValueError(f"--puzzles {args.puzzles} is not a file: pass a text file with one puzzle a line.")
        puzzles, _ = read_puzzles(args.puzzles)
        digest = hashlib.sha256(puzzles.tobytes()).hexdigest()[:12]
        task, mark = evaluation.sudoku_task(puzzles), f"{len(puzzles)} puzzles of {Path(args.puzzles).name} [{digest}]"
    pipe = _pipeline(args)
    plan = {"arms": SUDOKU_ARMS, "forwards": [16, 52], "seeds": [args.seed + i for i in range(3)]}
    return pipe, task, plan, f"{_named(args, 'sudoku')}: {mark} [{evaluation.fingerprint(pipe)}]"


def _sudoku_task(args, seed: int):
    """The task of solving generated puzzles; its name."""
    from .. import evaluation, sudoku

    count, clues = 20 if args.quick else args.num_puzzles or 100, 30 if args.clues is None else args.clues
    puzzles, _ = sudoku.make_puzzles(count, clues, seed=seed)
    return evaluation.sudoku_task(puzzles), f"{count} puzzles of {clues} clues from seed {seed}"


def _compare_text(args):
    """Pipeline, task, plan and name of a comparison by text written from nothing."""
    from .. import bundled, evaluation

    pipe, plan = _pipeline(args, "text"), evaluation.text_plan(args.model or bundled("text"))
    plan["seeds"] = [args.seed + seed for seed in plan["seeds"]]
    plan["forwards"] = [steps for steps in plan["forwards"] if not args.quick or steps <= 32] or plan["forwards"][:1]
    task, mark = _text_task(args, pipe, args.reference)
    return pipe, task, plan, f"{_named(args, 'text')}: {mark}"


def _texts_read(args, reference: str | None) -> set[str]:
    """The texts that generated ones are compared with, however their lines are broken."""
    from .. import bundled
    from ..evaluation.text_compare import held_out

    texts = {" ".join(text.split()) for text in held_out(args.model or bundled("text"), reference)}
    return texts - {""}  # which is in every text; scoring refuses it by name


def _share_a_text(some: set[str], others: set[str]) -> bool:
    """Is a text of one side also on the other, whole or as a part of a text there?"""
    return any(a in b or b in a for a in some for b in others)


def _text_task(args, pipe, reference: str | None):
    """The task of writing text from nothing, judged by a file or else by the model's own held-out texts; its name."""
    from .. import bundled, evaluation
    from .text import room

    folder, count = args.model or bundled("text"), 16 if args.quick else args.num_samples or 64
    length = room(pipe, None, args.gen_length)
    task = evaluation.task_of_folder(folder, reference, num_samples=count, gen_length=length)
    mark = evaluation.fingerprint(pipe, *evaluation.folder_contents(folder, reference))
    return task, f"{count} texts of {length} tokens [{mark}]"


def _named(args, default: str) -> str:
    """The model and head, for people; a finished cell is found again by this and `evaluation.fingerprint`."""
    head = f" with {args.quality_head}" if args.quality_head else ""
    return f"{args.model or f'bundled {default}'}{head}"
