"""A deeper model from a trained one: the middle layers come three times, and training goes on from there.

    python examples/sudoku/grow.py runs/sudoku-puzzles runs/sudoku-grown

Filling a hard Sudoku takes many deductions in a row, and each layer makes a few. Applied three times, layers 2 to 5 of
8 go on with what they do: the loss passes that of the 8 layers within 150 steps (docs/training.md).
"""

import argparse
import copy

import torch

from prism_pipelines import PrismPipeline

ORDER = [0, 1, *([2, 3, 4, 5] * 3), 6, 7]


def main() -> None:
    """Command line: one saved pipeline in, another out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="saved pipeline of a RobertaPreLayerNorm of 8 layers")
    parser.add_argument("target", help="folder to write")
    args = parser.parse_args()
    pipe = PrismPipeline.from_pretrained(args.source)
    encoder = pipe.model.roberta_prelayernorm.encoder
    if len(encoder.layer) != 8:
        raise SystemExit(f"{args.source} has {len(encoder.layer)} layers, not 8.")
    encoder.layer = torch.nn.ModuleList(copy.deepcopy(encoder.layer[i]) for i in ORDER)
    pipe.model.config.num_hidden_layers = len(ORDER)
    pipe.save_pretrained(args.target)


if __name__ == "__main__":
    main()
