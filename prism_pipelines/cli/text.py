"""`prism text`: write with the bundled text model and watch it correct itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .arguments import COUNT, Commands, add_command, add_live_flags, add_scheduler_flags
from .loading import change_scheduler, load_model

if TYPE_CHECKING:
    from rich.text import Text

    from ..pipeline_output import PrismPipelineOutput
    from ..pipeline_prism import PrismPipeline


def add_parser(commands: Commands) -> None:
    """Add the subcommand `text` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "text",
        run_text,
        "[PROMPT] [FLAGS]",
        help="write with the bundled text model and watch it correct itself",
        examples="""
            prism text
            prism text "KING HENRY." --num-samples 3
            prism text --scheduler mdlm --seed 7 --html run.html""",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue (default: write from nothing)")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-samples", metavar="N", type=COUNT, default=1, help="texts (default: 1)")
    group.add_argument(
        "--gen-length", metavar="N", type=COUNT, help="tokens to write (default: what fits, at most 256)"
    )
    group.add_argument(
        "--num-inference-steps", metavar="N", type=COUNT, default=64, help="forward passes, at most (default: 64)"
    )
    add_scheduler_flags(group, config=False)
    add_live_flags(parser, group, delay=0.05)


def load_pipeline(args: argparse.Namespace) -> PrismPipeline:
    """The pipeline that the flags describe, on its device, without its own progress bar.

    Raises:
        ValueError: the device is not there, or the model has no tokenizer.
    """
    from .. import bundled

    pipe = load_model(args.model or bundled("text"), args.device)
    if pipe.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, so it writes no text.")
    return pipe


def room(pipe: PrismPipeline, prompt: str | None, gen_length: int | None) -> int:
    """Tokens to generate: what the flag says, or what fits beside the prompt, at most 256.

    Raises:
        ValueError: nothing fits.
    """
    from ..models import checks

    if gen_length is not None:
        return gen_length
    limit = min(checks.max_length(pipe.model.config) or 256, 256)
    used = len(pipe.tokenizer(prompt).input_ids) if prompt else sum(map(len, pipe.text_frame))
    if used >= limit:
        raise ValueError(f"PROMPT has {used} tokens, and the model takes {limit} in all: shorten it.")
    return limit - used


def run_text(args: argparse.Namespace) -> int:
    """Run `prism text`; see `add_parser` for the flags. Returns the exit status."""
    import torch
    from rich.console import Console

    from ..schedulers.token_sampling import seeded_generators
    from .live_view import LiveView, page

    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("PROMPT is empty; leave it out to write from nothing")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(f"--html {args.html}: that folder does not exist")
    pipe, console = load_pipeline(args), Console(highlight=False)
    change_scheduler(pipe, args, "temperature")
    rows = args.num_samples
    remasked = torch.zeros(rows, dtype=torch.long)
    live = console.is_terminal and not (args.json or args.no_live)

    def draw(ids: list[int], states: list[str]) -> Text:
        return page([pipe.tokenizer.decode([token]) for token in ids], states)

    view = LiveView(console, draw, delay=args.delay) if live else None

    def on_step(pipe: PrismPipeline, i: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        remasked.add_(state["remasked"].sum(-1).cpu())
        return view.step(pipe, i, t, state) if view else {}

    def write() -> PrismPipelineOutput:
        out = pipe(
            args.prompt,
            num_samples=rows,
            gen_length=room(pipe, args.prompt, args.gen_length),
            num_inference_steps=args.num_inference_steps,
            # As evaluation.pipeline_texts: sample i depends on the seed and i alone.
            generator=seeded_generators(args.seed, range(rows)),
            callback_on_step_end=on_step,
            return_trace=bool(args.html),
        )
        return cast("PrismPipelineOutput", out)  # it is no tuple with return_dict=True, the default

    if view:
        with view:
            out = write()
    else:
        out = write()
    if out.trace is not None:
        out.trace.to_html(args.html, title="prism text")
    facts = {"forwards": out.nfe, "seed": args.seed, "scheduler": type(pipe.scheduler).__name__}
    if out.accepted is not None:
        facts |= {"forwards_per_text": out.nfe_per_row, "accepted": out.accepted.tolist()}
    if args.json:
        print(json.dumps({"prompt": args.prompt, "texts": out.texts, "remasked": remasked.tolist(), **facts}))
        return 0
    for i, text in enumerate(out.texts or []):
        if rows > 1:
            print(f"--- {i + 1} of {rows}")
        print((args.prompt or "") + text)
    if console.is_terminal:
        print(f"\n{out.nfe} forwards, {int(remasked.sum())} tokens remasked, seed {args.seed}.{_verdict(out)}")
    return 0


def _verdict(out: PrismPipelineOutput) -> str:
    """How many texts a rule that judges accepted, and in how many forwards; "" for other rules."""
    if out.accepted is None or out.nfe_per_row is None:
        return ""
    rows = len(out.nfe_per_row)
    mean = sum(out.nfe_per_row) / rows
    return f" {int(out.accepted.sum())} of {rows} accepted by the quality head, {mean:.0f} forwards each."
