"""`prism eval text`: measures of generated text against held-out text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import COUNT, Commands, add_command, check_device, refuse, show
from .loading import add_eval_flags, load_bundled_or, scheduler_facts, steps_within


def add_parser(kinds: Commands) -> None:
    """Add `text` to the subparsers of `prism eval`."""
    parser = add_command(
        kinds,
        "text",
        run,
        "--reference FILE (--texts FILE | --model MODEL) [FLAGS]",
        help="distances to held-out text, diversity, perplexity under a judge, MAUVE",
        description="Compare generated texts with held-out ones. Files are .jsonl, .json or .txt.",
        examples="""
            prism eval text --texts mine.jsonl --reference held_out.jsonl --ngram-judge train.jsonl
            prism eval text --model MODEL --reference held_out.jsonl --forwards 64 --judge gpt2""",
    )
    parser.add_argument("--reference", metavar="FILE", required=True, help="held-out texts")
    parser.add_argument("--texts", metavar="FILE", help="generated texts, in place of --model")
    parser.add_argument("--num-samples", metavar="N", type=COUNT, help="texts to generate (default: 64)")
    parser.add_argument("--gen-length", metavar="N", type=COUNT, help="tokens of each (default: 128)")
    parser.add_argument("--forwards", metavar="N", type=COUNT, help="forward passes of a text (default: 64)")
    parser.add_argument("--words", metavar="FILE", help="known words, between blanks (default: those of --reference)")
    parser.add_argument("--judge", metavar="MODEL", help="causal model, for generative perplexity")
    parser.add_argument(
        "--ngram-judge", metavar="FILE", help="or texts to count a 6-gram judge of bytes in: no download"
    )
    parser.add_argument("--featurizer", metavar="MODEL", help="folder or Hub id of a model, for MAUVE")
    add_eval_flags(parser, "it writes the texts; or pass --texts")


def run(args: argparse.Namespace) -> int:
    """Every measure of generated text that the flags allow. Returns the exit status."""
    from .. import evaluation
    from ..evaluation.text_models import check_mauve

    if args.texts is None and args.model is None:
        raise ValueError("Pass --texts FILE with generated texts, or --model to generate them.")
    if args.texts is not None:
        of_model = ("--model", "--quality-head", "--num-samples", "--gen-length", "--forwards", "--seed")
        refuse(args, (*of_model, "--scheduler", "--scheduler-config"), "on --texts")
    if args.judge is not None and args.ngram_judge is not None:
        raise ValueError("Pass one of --judge and --ngram-judge.")
    device = check_device(args.device)
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
        judge = evaluation.load_judge(args.judge, device=str(device))
    count = args.num_samples or 64
    texts = None if args.texts is None else evaluation.read_texts(args.texts)
    if args.featurizer is not None:
        check_mauve(count if texts is None else len(texts), len(reference))
        featurizer = evaluation.load_featurizer(args.featurizer, device=str(device))
    rule: dict = {}
    if texts is None:
        pipe = load_bundled_or(args, "sudoku")
        rule, length = scheduler_facts(pipe), args.gen_length or 128
        blocks = math.ceil(length / (pipe.config.mdm_spec["block_length"] or length))
        steps = steps_within(args.forwards or 64, pipe, blocks)
        texts = evaluation.pipeline_texts(pipe, count, length, steps, args.seed)
    result = evaluation.evaluate_text(texts, reference, vocabulary=vocabulary, judge=judge, featurizer=featurizer)
    return show(result | rule, args)


def _byte_judge(file: str) -> Callable[..., Any]:
    """A 6-gram judge of bytes, counted in the texts of a file."""
    from transformers import AutoTokenizer

    from .. import bundled, evaluation

    tokenizer = AutoTokenizer.from_pretrained(f"{bundled('text')}/tokenizer")
    return evaluation.ngram_judge(evaluation.read_texts(file), tokenizer, n=6)
