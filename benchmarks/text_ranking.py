"""Which visible bytes does a score put last? Head and backbone against the leave-one-out probability of the backbone.

Mask one token, and the backbone says how likely it was given all the others, p(x_i = y_i | y + m_i): what PRISM's head
is meant to learn, at one forward a token. Held fixed: bundled text model and texts. Varied: the score (quality head;
backbone's probability of the visible token), and what is scored: stretches of a held-out play, or texts that the model
wrote in 32 forwards without remasking; whole, or with 40 % masked.

Measured per text, means with a bootstrap over texts (95 %): rank correlation over all visible tokens; of the 8 tokens
with the lowest score, how many are among the 8 least likely; and their mean log probability, beside that of all tokens
and of the 8 least likely. Remasking reads the lowest few alone, so the last two are what counts.
The last line of stdout is one JSON object. Usage: python -m benchmarks.text_ranking [--num-texts 16]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import ROOT, files_fingerprint, origin
from prism_pipelines import MDLMScheduler, PrismPipeline, bundled
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import bootstrap_interval

LENGTH, LOWEST, MASKED, STEPS = 256, 8, 0.4, 32


@torch.no_grad()
def leave_one_out(pipe, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Log probability of each visible token of a row (L,) given all the others, float32 (N,)."""
    places, found = (ids != pipe.mask_token_id).nonzero()[:, 0], []
    for part in places.split(batch_size):
        rows = ids.repeat(len(part), 1)
        here = torch.zeros_like(rows, dtype=torch.bool)
        here[torch.arange(len(part)), part] = True
        rows[here] = pipe.mask_token_id
        logits = pipe.denoiser.logits(pipe.denoiser.hidden(rows), here).float()  # (B, V)
        found.append(logits.log_softmax(-1).gather(1, ids[part][:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def scores(pipe, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of the visible tokens of a row (L,), by one forward: (N,) each."""
    visible = (ids != pipe.mask_token_id)[None]
    hidden = pipe.denoiser.hidden(ids[None])
    own = pipe.denoiser.logits(hidden, visible).float().log_softmax(-1)
    return {"head": pipe.quality_head(hidden)[visible], "visible": own.gather(1, ids[visible[0]][:, None])[:, 0]}


def compared(score: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """What a score (N,) puts last, by the exact log probabilities (N,)."""
    ranks = [values.argsort().argsort().double().numpy() for values in (score, exact)]
    last, least = (set(values.topk(LOWEST, largest=False).indices.tolist()) for values in (score, exact))
    return {
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "among_least": len(last & least),
        "log_probability": float(exact[list(last)].mean()),
    }


def texts_of(pipe, count: int) -> dict[str, torch.Tensor]:
    """What is scored, int64 (count, LENGTH) each."""
    rows = [json.loads(line) for line in (Path(bundled("text")) / "heldout.jsonl").read_text().splitlines()]
    ids = pipe.tokenizer(rows[0]["text"], add_special_tokens=False).input_ids
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    pipe.scheduler = MDLMScheduler(order="random", temperature=1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    whole = {
        "held-out": torch.tensor([ids[start : start + LENGTH] for start in starts]),
        "written": pipe(
            num_samples=count,
            gen_length=LENGTH,
            num_inference_steps=STEPS,
            generator=generators,
            output_type="seq",
        ).sequences,
    }
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(count, LENGTH, generator=generator) < MASKED
    partly = {f"{name}, 40 % masked": rows.masked_fill(hidden, pipe.mask_token_id) for name, rows in whole.items()}
    return whole | partly


def main() -> int:
    """Score all texts and write the table. Returns exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-texts", type=int, default=16, help="of each kind (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "figures" / "text_ranking.json")
    args = parser.parse_args()
    pipe = PrismPipeline.from_pretrained(bundled("text"))
    pipe.set_progress_bar_config(disable=True)
    table = []
    for kind, rows in texts_of(pipe, args.num_texts).items():
        measured: dict[tuple[str, str], list[float]] = {}
        for ids in rows:
            exact = leave_one_out(pipe, ids, args.batch_size)
            given = scores(pipe, ids) | {"exact": exact, "all": torch.zeros_like(exact)}
            for name, score in given.items():
                found = {"log_probability": float(exact.mean())} if name == "all" else compared(score, exact)
                for metric, value in found.items():
                    measured.setdefault((name, metric), []).append(value)
        for (name, metric), values in measured.items():
            low, high = bootstrap_interval(values) or (None, None)
            row = {"texts": kind, "score": name, "metric": metric, "value": float(np.mean(values))}
            table.append(row | {"low": low, "high": high, "n": len(values)})
            print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    settings = {"num_texts": args.num_texts, "length": LENGTH, "lowest": LOWEST, "masked": MASKED, "steps": STEPS}
    settings["fingerprint"] = files_fingerprint(Path(bundled("text")), settings)
    result = {"settings": settings, "rows": table, **origin()}
    args.table.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
