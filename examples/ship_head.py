"""Copies a trained head into the package as `bundled("NAME-head")`, beside the model that it is for.

Usage: python examples/ship_head.py RUN NAME [--into FOLDER]
RUN is the folder of a finished training; NAME is that of a bundled pipeline.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import prism_pipelines
from prism_pipelines import JudgeAndRepairScheduler

# Where the answer is determined the quality is the probability that a token is right, which this rule asks for.
RECOMMENDED = {"sudoku": JudgeAndRepairScheduler()}


def ship(run: Path, name: str, into: Path) -> Path:
    """Write the folder of the head, and return it."""
    out = into / f"{name}-head"
    shutil.rmtree(out, ignore_errors=True)
    for part in ("quality_head", "scheduler"):
        shutil.copytree(run / part, out / part)
    shutil.copyfile(run / "training_log.jsonl", out / "training_log.jsonl")
    config = out / "quality_head" / "config.json"
    # The model is bundled too: it is named by its weights, not by a folder of the machine that trained the head.
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model": None}, indent=2, sort_keys=True) + "\n"
    )
    if name in RECOMMENDED:
        RECOMMENDED[name].save_pretrained(out / "scheduler")
    card = (run / "README.md").read_text()
    load = f'PrismPipeline.from_pretrained(bundled("{name}"), quality_head=bundled("{name}-head"))'
    card = card.replace('PrismPipeline.from_pretrained(".")', load)
    card = card.replace("import PrismPipeline\n", "import PrismPipeline, bundled\n")
    if name == "sudoku":
        puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
        card = card.replace(
            "num_samples=1, gen_length=32, num_inference_steps=32", f'infill="{puzzle}", num_inference_steps=128'
        )
    if name in RECOMMENDED:
        before, title, after = card.partition("## Recommended settings\n\n")
        rest = after[after.index(", loaded") :]
        card = f"{before}{title}`{type(RECOMMENDED[name]).__name__}()`{rest}"
    (out / "README.md").write_text(card)
    return out


def main(argv=None) -> int:
    """Copy, and say where to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", choices=["sudoku", "text"])
    parser.add_argument("--into", type=Path, default=Path(prism_pipelines.bundled("sudoku")).parent)
    args = parser.parse_args(argv)
    print(ship(args.run, args.name, args.into))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
