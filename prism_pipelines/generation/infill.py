"""Fill in, or score, every sequence of a file: one line or record each, in input order, resumable."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output_files import run_settings
from .running import Fill, check_counts, plan_batches, run_batches
from .sequence_output import FILLED, SCORED, check_columns, check_out, written_lines
from .sequences import masked_text, place_of, read_sequences, readable_text, restored_case

if TYPE_CHECKING:
    from torch import Generator

    from ..pipeline_prism import PrismPipeline

SHOWN = 5  # rows that are named in an error


def infill_many(
    pipe: PrismPipeline,
    source: str | Path,
    out: str | Path,
    *,
    column: str | None = None,
    positions: str | None = None,
    positions_column: str = "positions",
    marks: str = "",
    drop: str = "",
    num_samples: int = 1,
    select: str | None = None,
    num_inference_steps: int = 16,
    temperature: float | None = None,
    top_p: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    invalid: str = "error",
    progress: bool = True,
) -> dict:
    """Fill in what is masked in every row of a file. Called again, it is resumed.

    Row i has its own generators, seeded by `seed`, i and the number of the sample. The number of steps is the same for
    all rows, so the result does not depend on the batches. A row with nothing to fill is written unchanged.

    Args:
        pipe: a `PrismPipeline` with a tokenizer that has a mask token.
        source: path of a FASTA, CSV, TSV, JSONL or text file, see `read_sequences`.
        out: path of the output: .jsonl, .csv or .fasta, see `sequence_output.py`.
        column: of the text.
        positions: characters to fill in every row, from 1, such as "97-110,120"; None for none.
        positions_column: name of an optional column (or key of an object) with the positions of its row, which replace
            `positions`.
        marks: each of these characters stands for a token to fill, besides the tokenizer's own mask token.
        drop: characters to leave out, such as "-*".
        num_samples: samples of each row.
        select: "confidence" writes only the sample of the highest confidence of each row; needs a calibrated head.
        num_inference_steps: forward passes.
        temperature, top_p: of the pipeline.
        batch_size: sequences in a forward pass, but at least one row with all its samples.
        seed: of all rows, at least 0.
        invalid: for a row that cannot be used: "error" raises, "skip" writes the row with an "error".
        progress: draw a bar on stderr.
    Returns:
        {"rows", "skipped", "unmasked", "complete", "generated", "seconds"}; "unmasked" counts rows with nothing to
        fill.
    Raises:
        ValueError, TypeError: bad input, named by line; an output of another run; or out of memory.
        OSError: no such file or folder.
    """
    call = {"num_samples": num_samples, "select": select, "temperature": temperature, "top_p": top_p}
    call["num_inference_steps"] = num_inference_steps
    check_arguments(pipe, batch_size, seed, invalid)
    rows = read_sequences(source, column)
    check_columns(rows, FILLED)
    read = [prepared(pipe, row, row_positions(row, positions, positions_column), marks, drop) for row in rows]
    refuse_invalid(read, invalid, source)
    todo = [i for i, row in enumerate(read) if "error" not in row and row["masks"]]
    settings = {"command": "infill", **call, "seed": seed, "invalid": invalid}
    fill, batch_size = partial(fill_batch, pipe, read, seed, call), max(1, batch_size // num_samples)
    told = run_rows(pipe, rows, read, todo, Path(out), settings, batch_size, fill, FILLED, progress)
    return told | {"unmasked": sum("unmasked" in row for row in read)}


def fill_batch(
    pipe: PrismPipeline, read: list[dict], seed: int, call: dict, batch: list[int]
) -> list[tuple[dict, int]]:
    """`filled` for the rows with the numbers in `batch`, with a generator for each sample."""
    from ..schedulers.token_sampling import seeded_generators  # loads torch, which `prism --help` does without

    numbers = (i * 1009 + k for i in batch for k in range(call["num_samples"]))
    return filled(pipe, [read[i] for i in batch], seeded_generators(seed, numbers), call)


def score_many(
    pipe: PrismPipeline,
    source: str | Path,
    out: str | Path,
    *,
    by: str = "head",
    column: str | None = None,
    marks: str = "",
    drop: str = "",
    batch_size: int = 8,
    invalid: str = "error",
    progress: bool = True,
) -> dict:
    """The quality of every token of every row of a file. Called again, it is resumed.

    Args:
        pipe, source, out, column, marks, drop, batch_size, invalid, progress: as `infill_many`.
        by: "head", "own" or "leave_one_out", see `PrismPipeline.score`.
    Returns:
        {"rows", "skipped", "complete", "generated", "seconds"}.
    Raises:
        ValueError, TypeError, OSError: as `infill_many`.
    """
    check_arguments(pipe, batch_size, 0, invalid)
    rows = read_sequences(source, column)
    check_columns(rows, SCORED)
    read = [prepared(pipe, row, None, marks, drop) for row in rows]
    refuse_invalid(read, invalid, source)
    settings = {"command": "score", "by": by, "invalid": invalid}

    def fill(batch: list[int]) -> list[tuple[dict, int]]:
        return scored(pipe, [read[i] for i in batch], by)

    todo = [i for i, row in enumerate(read) if "error" not in row]
    return run_rows(pipe, rows, read, todo, Path(out), settings, batch_size, fill, SCORED, progress)


def check_arguments(pipe: PrismPipeline, batch_size: int, seed: int, invalid: str) -> None:
    """Raise a ValueError if an argument, or the pipeline, cannot be used for a file of sequences."""
    check_counts(batch_size, seed)
    if invalid not in ("error", "skip"):
        raise ValueError(f'`invalid` must be "error" or "skip", got {invalid!r}.')
    if pipe.tokenizer is None or pipe.tokenizer.mask_token is None:
        raise ValueError(
            "The pipeline has no tokenizer with a mask token, so it cannot read sequences to fill or score."
        )


def row_positions(row: dict, positions: str | None, column: str) -> Any:
    """The positions to fill in a row: those in its column `column`, else `positions`."""
    own = row["record"].get(column) if column in row["record"] else None
    return positions if own in (None, "") else own


def prepared(pipe: PrismPipeline, row: dict, positions: Any, marks: str, drop: str) -> dict:
    """A row as the model reads it: {"place", "text", "reads", "tokens", "masks"}.

    A row that cannot be used has an "error" too. A row without a mask has "unmasked": True.
    """
    from ..models.checks import max_length
    from ..sampling.canvas import whole_ids

    tokenizer, limit = pipe.tokenizer, max_length(pipe.model.config)
    done = {"place": place_of(row), "text": row["text"], "reads": None, "tokens": 0, "masks": 0}
    if row.get("error"):
        return done | {"error": row["error"]}
    longest = max(map(len, tokenizer.get_vocab()))
    if limit is not None and len(row["text"]) > limit * longest:  # known without reading megabytes
        return done | {"error": f"{len(row['text']):,} characters are too long, the model takes {limit} tokens"}
    try:
        text = masked_text(row["text"], tokenizer, positions, marks, drop)
    except ValueError as error:
        return done | {"error": str(error)}
    reads, unknown = readable_text(text, tokenizer)
    if unknown:
        where = text.upper().find(unknown[0].upper()) + 1
        return done | {"error": f"{unknown[0]!r:.20} at position {where} is unknown to the tokenizer"}
    ids = whole_ids(reads, tokenizer)
    if limit is not None and len(ids) > limit:
        return done | {"error": f"{len(ids):,} tokens are too long, the model takes {limit}"}
    masks = ids.count(pipe.mask_token_id)
    done |= {"text": text, "reads": reads, "tokens": len(ids), "masks": masks}
    return done if masks else done | {"unmasked": True}


def refuse_invalid(read: list[dict], invalid: str, source: str | Path) -> None:
    """Raise a ValueError that names the rows that cannot be used, unless `invalid` is "skip"."""
    bad = [f"{row['place']}: {row['error']}" for row in read if "error" in row]
    if bad and invalid == "error":
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {len(read)} rows of {source} cannot be used. {'; '.join(bad[:SHOWN])}{more}. "
            'invalid="skip" (--invalid skip) does the others, and writes these with the reason. Of characters that are '
            "unknown, --drop leaves out those that it names, and --mask has them filled."
        )


def run_rows(
    pipe: PrismPipeline,
    rows: list[dict],
    read: list[dict],
    todo: list[int],
    out: Path,
    settings: dict,
    batch_size: int,
    fill: Fill,
    columns: tuple[str, ...],
    progress: bool,
) -> dict:
    """Run `fill` on the rows `todo`, and write all rows."""
    check_out(out)
    settings = run_settings(pipe, rows, settings | {"read_as": [row["reads"] for row in read]})
    lengths = [row["tokens"] for row in read]
    batches = [[todo[i] for i in batch] for batch in plan_batches([lengths[i] for i in todo], batch_size)]
    lines = partial(written_lines, out.suffix.lower(), rows, read, columns)
    told = run_batches(out, settings, batches, lengths, fill, lines, "sequences", progress)
    told.pop("tokens")
    return {"rows": len(rows), "skipped": sum("error" in row for row in read)} | told


def filled(pipe: PrismPipeline, rows: list[dict], generators: list[Generator], call: dict) -> list[tuple[dict, int]]:
    """For each row {"samples": a record for each sample that is written}, and the number of filled tokens."""
    import torch

    head = pipe.quality_head is not None
    with warnings.catch_warnings():  # rows have as many masks as they have; the steps are those of the file
        warnings.filterwarnings("ignore", message=".*steps will write nothing")
        out: Any = pipe(infill=[row["reads"] for row in rows], generator=generators, return_quality=head, **call)
    kept = len(out.texts) // len(rows)
    sizes = torch.tensor([row["tokens"] for row in rows for _ in range(kept)])
    mask = (torch.arange(out.sequences.shape[1]) < sizes[:, None]).long()
    quality = out.quality
    if not head:
        quality, _, _ = pipe.score(input_ids=out.sequences, attention_mask=mask, by="own")
    results = []
    for i, row in enumerate(rows):
        given = torch.tensor(ids_of(pipe, row))
        written = (given == pipe.mask_token_id).nonzero()[:, 0]
        samples = []
        for k in range(i * kept, (i + 1) * kept):
            values = [round(value, 4) for value in quality[k].cpu()[written].tolist()]
            samples.append(
                {
                    "filled": restored_case(out.texts[k], row["text"], pipe.tokenizer.mask_token),
                    "confidence": float(f"{float(out.confidence[k]):.4g}") if out.confidence is not None else None,
                    "mean_quality": round(sum(values) / len(values), 4),
                    "quality": values,
                    "nfe": out.nfe_per_row[k] + (not head),
                }
            )
        results.append(({"samples": samples}, len(written) * kept))
    return results


def scored(pipe: PrismPipeline, rows: list[dict], by: str) -> list[tuple[dict, int]]:
    """For each row {"samples": [its record]}, and the number of its tokens."""
    import torch

    ids = [ids_of(pipe, row) for row in rows]
    longest, opening, closing = max(map(len, ids)), len(pipe.text_frame.opening), len(pipe.text_frame.closing)
    padded = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in ids])
    mask = (torch.arange(longest) < torch.tensor([len(row) for row in ids])[:, None]).long()
    quality, _, _ = pipe.score(input_ids=padded, attention_mask=mask, by=by)
    results = []
    for row, values in zip(ids, quality.tolist(), strict=True):
        inside = range(opening, len(row) - closing)
        tokens = [pipe.tokenizer.decode([row[i]]) for i in inside]
        values = [None if row[i] == pipe.mask_token_id else round(values[i], 4) for i in inside]
        known = [(value, i) for i, value in enumerate(values) if value is not None]
        lowest, worst = min(known) if known else (None, None)
        record = {
            "mean_quality": round(sum(v for v, _ in known) / len(known), 4) if known else None,
            "mean_log_quality": round(sum(math.log(max(v, 1e-4)) for v, _ in known) / len(known), 4) if known else None,
            "lowest_quality": lowest,
            "lowest_token": None if worst is None else f"{tokens[worst].strip()}{worst + 1}",
            "tokens": tokens,
            "quality": values,
            "nfe": len(known) if by == "leave_one_out" else 1,
        }
        results.append(({"samples": [record]}, len(values)))
    return results


def ids_of(pipe: PrismPipeline, row: dict) -> list[int]:
    """Ids of a row as the model reads it."""
    from ..sampling.canvas import whole_ids

    return whole_ids(row["reads"], pipe.tokenizer)
