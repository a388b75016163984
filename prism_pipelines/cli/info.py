"""`prism info MODEL`: what was detected about a masked diffusion model, why, and whether it behaves so."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from .arguments import Commands, add_command, add_device_flag, check_device
from .loading import add_head_flag, add_source_flags

if TYPE_CHECKING:
    from ..models.families import MDMSpec
    from ..pipeline_prism import PrismPipeline


def add_parser(commands: Commands) -> None:
    """Add the subcommand `info` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "info",
        run,
        "MODEL [FLAGS]",
        help="what is known about a model, and whether it behaves so",
        description="Load a masked diffusion model, print what was detected and why, and probe it.",
        examples="""
            prism info GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16
            prism info my-model --mask-token-id 126336 --json""",
        status="0 no probe failed, 1 a probe failed, 2 the model cannot be loaded.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id: a pipeline, a model, or a head")
    parser.add_argument("--subfolder", metavar="NAME", default="", help="of MODEL")
    parser.add_argument("--mask-token-id", metavar="ID", type=int, help="overrides what is detected")
    parser.add_argument("--text", metavar="TEXT", help="ordinary text for the shift probe (default: English)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    add_head_flag(parser)
    add_source_flags(parser)
    add_device_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Load, report, probe. Returns the exit status."""
    import torch

    from ..models.probes import run_probes
    from ..pipeline_prism import PrismPipeline

    device = check_device(args.device)
    pipe = PrismPipeline.from_pretrained(
        args.model,
        quality_head=args.quality_head,
        revision=args.revision,
        subfolder=args.subfolder,
        mask_token_id=args.mask_token_id,
        dtype=getattr(torch, args.dtype),
        trust_remote_code=args.trust_remote_code,
    ).to(device)
    facts = describe(pipe, args)
    findings = run_probes(pipe, args.text)
    failed = any(finding.verdict == "wrong" for finding in findings)
    if args.json:
        print(json.dumps({"facts": facts, "probes": [finding._asdict() for finding in findings]}))
        return int(failed)
    for name, value in facts.items():
        print(f"{name:18}{value}")
    for finding in findings:
        print(f"{f'{finding.probe}?':18}{finding.verdict}: {finding.seen}")
    if failed:
        print("prism: the model does not behave as declared; pass mdm_spec=MDMSpec(...)", file=sys.stderr)
    return int(failed)


def describe(pipe: PrismPipeline, args: argparse.Namespace) -> dict[str, str]:
    """What is in use and where each fact comes from, in words."""
    from ..models.families import recipe_of

    spec, recipe = pipe.spec, recipe_of(pipe.spec)
    head, count = pipe.quality_head, sum(parameter.numel() for parameter in pipe.model.parameters())
    native = type(pipe.model).__module__.startswith("transformers.")
    facts = {
        "model": f"{args.model}, {count / 1e6:,.1f} M parameters, {str(pipe.model.dtype).removeprefix('torch.')}",
        "class": type(pipe.model).__name__ + (" (native)" if native else " (named by the checkpoint)"),
        "tokenizer": "none"
        if pipe.tokenizer is None
        else f"{type(pipe.tokenizer).__name__}, {len(pipe.tokenizer)} ids",
        "mask_token_id": f"{spec.mask_token_id} ({mask_origin(pipe, spec, args.mask_token_id)})",
        "attention": spec.attention + (f", blocks of {spec.block_length}" if spec.block_length else ""),
        "logit_shift": str(spec.logit_shift),
        "attention mask": spec.mask_format + (f", with {', '.join(spec.extra_inputs)}" if spec.extra_inputs else ""),
        "keys renamed": f"{len(recipe.key_mapping)} rules" if recipe.key_mapping else "no",
        "LoRA targets": ", ".join(spec.lora_targets) or "not known",
        "source": spec.source or "passed by the caller",
        "tested": "against an independent reference" if recipe.tested else "NO: compare with the authors' own code",
        "quality head": f"{head.config.architecture}, hidden size {head.config.hidden_size}" if head else "none",
        "context": context_read(pipe),
        "remasking": remasking(pipe),
    }
    return facts


def mask_origin(pipe: PrismPipeline, spec: MDMSpec, given: int | None) -> str:
    """Who knew the mask id."""
    if given is not None:
        return "given"
    for name, owner in (("config", pipe.model.config), ("tokenizer", pipe.tokenizer)):
        if getattr(owner, "mask_token_id", None) == spec.mask_token_id:
            return f"from the {name}"
    return f"from the row of its family, {spec.source}" if spec.source else "saved with the pipeline"


def context_read(pipe: PrismPipeline) -> str:
    """What head and scheduler read of the run besides hidden states and logits."""
    parts = {"head": pipe.quality_head, "scheduler": pipe.scheduler}
    reads = {name: ", ".join(getattr(part, "reads_context", ())) for name, part in parts.items()}
    return "; ".join(f"{name}: {inputs}" for name, inputs in reads.items() if inputs) or "none is read"


def remasking(pipe: PrismPipeline) -> str:
    """What the scheduler in use does, and what could be done without a head."""
    name = type(pipe.scheduler).__name__
    if pipe.quality_head is None and name == "MDLMScheduler":
        return f"{name}: none; SelfConfidenceScheduler remasks without a head"
    return name
