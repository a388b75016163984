"""`prism eval calibration`: does the quality head know what is wrong?"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .arguments import COUNT, Commands, add_command, refuse, show
from .loading import add_eval_flags, load_bundled_or

if TYPE_CHECKING:
    from ..pipeline_prism import PrismPipeline


def add_parser(kinds: Commands) -> None:
    """Add `calibration` to the subparsers of `prism eval`."""
    parser = add_command(
        kinds,
        "calibration",
        run,
        "[FLAGS]",
        help="does the head know what is wrong? AUROC, ECE, Brier, plot",
        description="Plant tokens of the model's own among right ones, and compare what the head says with the truth.",
        examples="""
            prism eval calibration --out runs/calibration
            prism eval calibration --data held_out.jsonl --model MODEL --quality-head HEAD""",
    )
    parser.add_argument("--data", metavar="DATA", default="sudoku", help="sudoku (default), or a file of texts")
    parser.add_argument("--num-sequences", metavar="N", type=COUNT, default=256, help="default: 256")
    parser.add_argument("--max-length", metavar="N", type=COUNT, default=128, help="tokens of a text (default: 128)")
    parser.add_argument(
        "--packing",
        choices=["true", "false"],
        help="texts end to end, cut into --max-length (default: as in training: language models true, encoders false)",
    )
    parser.add_argument(
        "--num-revealed", metavar="N", type=COUNT, default=1, help="tokens planted at once (default: 1)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="write calibration.json, .md and .png there")
    add_eval_flags(parser, "default: the bundled model for the data", sampling=False)


def run(args: argparse.Namespace) -> int:
    """Calibration of the head and of the backbone's own probability. Returns the exit status."""
    import torch

    from .. import evaluation, sudoku

    if args.data == "sudoku":
        refuse(args, ("--packing",), "on Sudoku")
        pipe = load_bundled_or(args, "sudoku")
        if pipe.mask_token_id != sudoku.MASK_ID or getattr(pipe.model.config, "vocab_size", None) != sudoku.VOCAB_SIZE:
            raise ValueError(f"{args.model} is not a Sudoku model; pass --data FILE with texts.")
        data: dict[str, Any] = {
            "input_ids": torch.as_tensor(sudoku.make_puzzles(args.num_sequences, 36, seed=args.seed)[1]).long(),
            "trainable_mask": None,
        }
    else:
        texts, pipe = evaluation.read_texts(args.data), load_bundled_or(args, "text")
        packing = None if args.packing is None else args.packing == "true"
        data = text_sequences(texts, pipe, args.max_length, args.num_sequences, packing)
    result = evaluation.evaluate_calibration(
        pipe,
        data["input_ids"],
        trainable_mask=data["trainable_mask"],
        attention_mask=data.get("attention_mask"),
        num_revealed=args.num_revealed,
        seed=args.seed,
        out_dir=args.out,
    )
    return show(result, args, evaluation.calibration_table(result))


def text_sequences(
    texts: list[str], pipe: PrismPipeline, length: int, count: int, packing: bool | None = None
) -> dict[str, Any]:
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
            f"--data holds {len(examples[0]['input_ids'])} tokens, less than one sequence of --max-length {length}."
        )
    if not examples:
        raise ValueError(f"--data holds no text of at most --max-length {length} tokens.")
    print(examples_line(rows, encoder, examples), file=sys.stderr)
    batch = pad_batch(examples, pipe.tokenizer.pad_token_id or 0)
    # Some tokenizers write padding for what they do not know.
    strange = [token for token in (pipe.tokenizer.unk_token_id, pipe.tokenizer.pad_token_id) if token is not None]
    ids = torch.cat([example["input_ids"] for example in examples])
    if (unknown := torch.isin(ids, torch.tensor(strange, dtype=torch.long)).float().mean()) > 0.5:
        raise ValueError(f"The model's tokenizer does not know {unknown:.0%} of --data: it is made for other text.")
    return batch
