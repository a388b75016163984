"""`prism convert SRC DST`: a checkpoint of pickled weights as a folder of safetensors that loads here, and probed."""

from __future__ import annotations

import argparse
import sys

from .arguments import Commands, add_command, values


def add_parser(commands: Commands) -> None:
    """Add the subcommand `convert` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "convert",
        run,
        "SRC DST [FLAGS]",
        help="pickled weights (pytorch_model.bin) as safetensors with a tokenizer, checked",
        description="Read pickled weights without running code (weights_only=True), match their names with those of "
        "the model's class, write safetensors, config.json and a tokenizer, and probe the result as `prism info` does.",
        examples="""
            prism convert AntiBERTy_md_smooth antibody --vocab vocab.txt
            prism convert owner/old-model converted --tokenizer bert-base-uncased""",
        status="0 done, 1 written but a probe failed, 2 it cannot be converted and nothing was written.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or Hub id with config.json and pickled weights")
    parser.add_argument("folder", metavar="DST", help="folder to write; empty or absent")
    parser.add_argument("--subfolder", metavar="NAME", default="", help="of SRC")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of SRC")
    parser.add_argument("--weights", metavar="FILE", help="file in SRC (default: pytorch_model.bin, also in parts)")
    parser.add_argument("--vocab", metavar="FILE", help="one token a line: a tokenizer of one token a character")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id of a tokenizer, in place of --vocab")
    parser.add_argument("--mask-token-id", metavar="ID", type=int, help="overrides what is detected, for the probes")
    parser.add_argument("--text", metavar="TEXT", help="ordinary text for the shift probe (default: English)")


def run(args: argparse.Namespace) -> int:
    """Convert, report, probe. Returns the exit status."""
    from ..hub.convert import convert_checkpoint
    from ..models.probes import run_probes
    from ..pipeline_prism import PrismPipeline

    how = values(args, "subfolder", "weights", "vocab", "tokenizer", "revision")
    done = convert_checkpoint(args.source, args.folder, **how)
    print(f"{'weights':18}{done.weights} tensors, {len(done.renamed)} renamed, {len(done.left_out)} left out")
    for name in done.left_out:
        print(f"{'':18}left out: {name}")
    print(f"{'tokenizer':18}{done.tokenizer}")
    pipe = PrismPipeline.from_pretrained(args.folder, mask_token_id=args.mask_token_id)
    findings = run_probes(pipe, args.text)
    for finding in findings:
        print(f"{f'{finding.probe}?':18}{finding.verdict}: {finding.seen}")
    if any(finding.verdict == "wrong" for finding in findings):
        print(f"prism: {args.folder} is written, but the model does not behave as declared", file=sys.stderr)
        return 1
    print(f"{'written':18}{args.folder}")
    return 0
