"""Types and checks of command-line arguments that several subcommands take."""

from __future__ import annotations

import argparse
import math


def scheduler_name(text: str) -> str:
    """An argparse type: a name that `schedulers.by_name.scheduler_class` knows."""
    from ..schedulers.by_name import scheduler_class

    try:
        return scheduler_class(text).__name__
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number_type(kind, low, words: str):
    """An argparse type: a finite `kind` (int or float) not below `low`, called `words` in the error."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")
        return value

    return parse


def check_device(name: str):
    """The torch device of `--device`.

    Raises:
        ValueError: there is no such device, or it is not available.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
