"""The training command with noise that depends on each row's content alone, so that it does not matter who draws it.

python tests/content_noise.py <flags of the training command>

Then a step is a function of its examples, and one process can be compared with several. Drawn tokens must be the most
likely ones: --draw-temperature 0 --reveal-order confidence.
"""

import sys

import torch

from prism_pipelines.training import losses
from prism_pipelines.training.run import main


def seeded(row):
    return torch.Generator().manual_seed(int((row * torch.arange(1, len(row) + 1)).sum()))


def mask_tokens(ids, rate, mask_token_id, trainable, generator):
    noise = torch.stack([torch.rand(ids.shape[1], generator=seeded(row)) for row in ids])
    masked = trainable & (noise < rate[:, None])
    return ids.masked_fill(masked, mask_token_id), masked


class Rates:
    """`losses.mask_rates`, of the rows of the `corrupt` that is under way."""

    def __enter__(self):
        self.corrupt = losses.MDMObjective.corrupt
        self.others = losses.mask_rates, losses.mask_tokens

        def corrupt(objective, input_ids, *args, **kwargs):
            # Rates from 0.02: some rows have fewer masks than k, so counts differ between batches.
            rates = [0.02 + 0.9 * float(torch.rand(1, generator=seeded(row))) ** 3 for row in input_ids]
            losses.mask_rates = lambda *_: torch.tensor(rates)
            return self.corrupt(objective, input_ids, *args, **kwargs)

        losses.MDMObjective.corrupt, losses.mask_tokens = corrupt, mask_tokens

    def __exit__(self, *error):
        losses.MDMObjective.corrupt = self.corrupt
        losses.mask_rates, losses.mask_tokens = self.others


if __name__ == "__main__":
    with Rates():
        sys.exit(main())
