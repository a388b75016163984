"""Flags that say which model, head and scheduler a command uses, and the pipeline that they name."""

from __future__ import annotations

import argparse
import os

DTYPES = ("float32", "bfloat16", "float16")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of scheduler, head, revision, dtype and device; MODEL itself is the command's."""
    parser.add_argument("--scheduler", metavar="NAME", help="such as SelfConfidenceScheduler (default: the pipeline's)")
    parser.add_argument(
        "--scheduler-config",
        "--scheduler_config",
        metavar="JSON",
        help="fields to set in it, such as '{\"num_remask\": 4}'",
    )
    parser.add_argument("--quality-head", "--quality_head", metavar="HEAD", help="folder or Hub id of a head for MODEL")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL")
    parser.add_argument(
        "--torch-dtype", "--torch_dtype", "--dtype", choices=DTYPES, default="float32", help="default: %(default)s"
    )
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--trust-remote-code", "--trust_remote_code", action="store_true", help="run model code of the repository"
    )


def load_pipeline(args: argparse.Namespace):
    """The pipeline of a command's flags, on its device; joins the other processes if a launcher started several."""
    import torch

    from ..pipeline_prism import PrismPipeline
    from ..schedulers.by_name import change_scheduler

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = _join(device)
    pipe = PrismPipeline.from_pretrained(
        args.model,
        quality_head=args.quality_head,
        revision=args.revision,
        torch_dtype=getattr(torch, args.torch_dtype),
        trust_remote_code=args.trust_remote_code,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler is not None or args.scheduler_config is not None:
        pipe.scheduler = change_scheduler(pipe.scheduler, args.scheduler, args.scheduler_config)
    return pipe


def leave_processes() -> None:
    """Leave the process group that `load_pipeline` joined, if it did."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _join(device: str):
    """Join the process group that the launcher describes; this process's device."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError('Several processes need accelerate: pip install "prism-pipelines[train]".') from None
    return PartialState(cpu=str(device) == "cpu").device
