"""Flags that say which model, head and scheduler a command uses, and the pipeline that they name."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .arguments import add_device_flag, add_scheduler_flags, add_seed_flag, check_device

if TYPE_CHECKING:
    import torch

    from ..pipeline_prism import PrismPipeline

DTYPES = ("float32", "bfloat16", "float16")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of scheduler, head, revision, dtype and device; MODEL itself is the command's."""
    group = parser.add_argument_group("model")
    add_head_flag(group)
    add_scheduler_flags(group)
    add_source_flags(group)
    add_device_flag(group)


def add_head_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--quality-head", metavar="HEAD", help="folder or Hub id of a head for the model")


def add_source_flags(group: argparse._ActionsContainer) -> None:
    """How the files of MODEL are read: revision, dtype, code of the repository."""
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of MODEL")
    group.add_argument(
        "--dtype", metavar="DTYPE", choices=DTYPES, default="float32", help="float32 (default), bfloat16 or float16"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run model code of the repository")


def add_bundled_model_flags(group: argparse._ActionsContainer, otherwise: str) -> None:
    """Flags of commands that take a bundled model unless another is named."""
    group.add_argument("--model", metavar="MODEL", help=f"folder or Hub id ({otherwise})")
    add_head_flag(group)
    add_device_flag(group)


def add_eval_flags(parser: argparse.ArgumentParser, otherwise: str, sampling: bool = True) -> None:
    """What the evaluations share: model, scheduler (with `sampling`), seed and output.

    Args:
        otherwise: what is measured without `--model`, in words.
    """
    group = parser.add_argument_group("model and sampling")
    add_bundled_model_flags(group, otherwise)
    if sampling:
        add_scheduler_flags(group)
    else:
        parser.set_defaults(scheduler=None, scheduler_config=None)
    add_seed_flag(group)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def load_model(source: str, device: str | None, quality_head: str | None = None) -> PrismPipeline:
    """A pipeline without its own progress bar, on the device of `--device`, which is checked first.

    Raises:
        ValueError: the device is not there, or what `source` names cannot be loaded.
    """
    from ..pipeline_prism import PrismPipeline

    place = check_device(device)
    try:
        pipe = PrismPipeline.from_pretrained(source, quality_head=quality_head)
    except (KeyError, TypeError, RuntimeError) as error:  # what loading a damaged folder raises
        raise ValueError(f"{source} cannot be loaded: {error!r}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def load_bundled_or(args: argparse.Namespace, default: str) -> PrismPipeline:
    """The pipeline of `--model`, or the bundled one called `default`, with the scheduler that the flags ask for."""
    from .. import bundled

    pipe = load_model(args.model or bundled(default), args.device, args.quality_head)
    change_scheduler(pipe, args)
    return pipe


def load_pipeline(args: argparse.Namespace) -> PrismPipeline:
    """The pipeline of a command's flags, on its device; joins the other processes if a launcher started several."""
    import torch

    from ..pipeline_prism import PrismPipeline

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = _join(args.device) if several else check_device(args.device)
    pipe = PrismPipeline.from_pretrained(
        args.model,
        quality_head=args.quality_head,
        revision=args.revision,
        dtype=getattr(torch, args.dtype),
        trust_remote_code=args.trust_remote_code,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    change_scheduler(pipe, args)
    return pipe


def change_scheduler(pipe: PrismPipeline, args: argparse.Namespace, *flags: str) -> None:
    """Give the pipeline the scheduler that the flags ask for; what they leave open stays as the model has it.

    Args:
        flags: names of fields that have a flag of their own, such as "temperature"; none for `--scheduler-config`.
    Raises:
        ValueError: a field that the scheduler does not have.
    """
    from ..schedulers import by_name

    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    fields = (given or None) if flags else args.scheduler_config
    if args.scheduler is None and fields is None:
        return
    try:
        pipe.scheduler = by_name.change_scheduler(pipe.scheduler, args.scheduler, fields)
    except ValueError as error:
        said = [f"--{name.replace('_', '-')}" for name in given] or ["--scheduler-config"]
        raise ValueError(f"{', '.join(said)}: {error}") from None


def scheduler_facts(pipe: PrismPipeline) -> dict[str, Any]:
    """The scheduler that a result was made with, and its fields."""
    from ..schedulers.validation import own_fields

    return {"scheduler": {"name": type(pipe.scheduler).__name__, **own_fields(pipe.scheduler)}}


def steps_within(forwards: int, pipe: PrismPipeline, blocks: int = 1) -> int:
    """`num_inference_steps` that make `--forwards` forward passes: a refinement loop makes more, in every block."""
    from ..schedulers.validation import loop_steps

    loop = blocks * loop_steps(pipe.scheduler)
    if loop and forwards <= loop:
        raise ValueError(f"--forwards {forwards} must be more than the {loop} of the scheduler's loop_steps.")
    return forwards - loop


def leave_processes() -> None:
    """Leave the process group that `load_pipeline` joined, if it did."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _join(device: str | None) -> torch.device:
    """Join the process group that the launcher describes; this process's device."""
    import torch

    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError('Several processes need accelerate: pip install "prism-pipelines[train]".') from None
    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available()).device
