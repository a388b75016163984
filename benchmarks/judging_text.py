"""Does a head that was distilled from the model alone write better text than rules without it, at equal forwards?

Held fixed: bundled text model, temperature 1, 256 bytes a text, seeds. Varied: the rule, and the number of forwards.
Every head is an arm: pass several for several training seeds. Token-Critic has weights of its own, made from the same
model by examples/text/critic.args; it runs if its folder is given, and half of its forwards judge. Measures and
intervals are those of `benchmarks.text`, without the judge; reference: MDLM, paired by seed. A finished cell is not run
again. The last line of stdout is one JSON object, which --table also writes to a file.
Usage: python -m benchmarks.judging_text [--quick] [--quality-head FOLDER ...] [--critic FOLDER] [--dtype bfloat16]
    [--table FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.shared import ROOT, give, origin
from prism_pipelines import PrismPipeline, bundled
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import folder_contents, pipeline_fingerprint, run_comparison, task_of_folder

LENGTH, FORWARDS = 256, (16, 32, 64)
RULES = [
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "eta": 0.03},
    {"name": "token to mask", "scheduler": "TokenToMaskScheduler", "order": "random", "remask_threshold": 0.1},
    {"name": "sweep", "scheduler": "StridedSweepScheduler", "order": "random"},
    {"name": "PRISM one-step", "scheduler": "PrismScheduler", "order": "random", "eta": 0.1},
]
CRITIC = {"name": "Token-Critic", "scheduler": "TokenCriticScheduler", "noise": 2.0}
DISTILLED = {"scheduler": "PrismScheduler", "order": "random", "quality_threshold": 0.02, "max_share": 0.25}


def load(head: str | None, model: str, dtype: torch.dtype, device: str) -> PrismPipeline:
    """A saved pipeline with this head, or with its own, without a progress bar."""
    pipe = PrismPipeline.from_pretrained(model, quality_head=head).to(torch.device(device), dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def all_arms(
    heads: list[str], critic: str | None, dtype: torch.dtype, device: str
) -> tuple[list[dict], dict[str, PrismPipeline]]:
    """The arms, and the pipelines of those that have weights of their own. A cell must not outlive its weights."""
    wanted = [(DISTILLED | {"name": f"distilled head {Path(head).name}"}, head, bundled("text")) for head in heads]
    wanted += [] if critic is None else [(CRITIC, None, critic)]
    arms, models = list(RULES), {}
    for arm, head, folder in wanted:
        pipe = load(head, folder, dtype, device)
        models[mark := pipeline_fingerprint(pipe)] = pipe
        arms.append(arm | {"model": mark})
    return arms, models


def docs_table(result: dict) -> str:
    """The table of docs/judging.md, from the JSON."""
    cells = {(row["arm"], row["forwards"], row["metric"]): row for row in result["rows"]}
    arms, forwards = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    others = {"known_words": "known words", "entropy": "entropy", "distinct_2": "distinct 2-grams"}
    titles = ["rule", *(f"distance, {n} passes" for n in forwards), *others.values()]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for arm in arms:
        found = ["{value:.3f} ({low:.3f}-{high:.3f})".format(**cells[arm, n, "ngram_js"]) for n in forwards]
        found += [" / ".join(f"{cells[arm, n, name]['value']:.2f}" for n in forwards) for name in others]
        lines.append(f"| {arm} | {' | '.join(found)} |")
    return "\n".join(lines)


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 texts of one seed at 16 forwards: minutes")
    parser.add_argument("--quality-head", nargs="+", default=[], metavar="FOLDER", help="of distilled heads, by name")
    parser.add_argument("--critic", metavar="FOLDER", help="saved pipeline of a Token-Critic (default: no such arm)")
    parser.add_argument("--num-samples", type=int, default=64, help="texts a cell (default: %(default)s)")
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--forwards", type=int, nargs="+", default=list(FORWARDS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(ROOT / "runs" / "judging-text"), help="finished cells (%(default)s)")
    parser.add_argument("--table", type=Path, help="write the JSON there")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run every cell that is missing and print the table. Returns the exit status."""
    args = parse_args(argv)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    pipe = load(None, bundled("text"), dtype, args.device)
    arms, models = all_arms(args.quality_head, args.critic, dtype, args.device)
    count, seeds = (16, 1) if args.quick else (args.num_samples, args.num_seeds)
    found = run_comparison(
        pipe,
        task_of_folder(bundled("text"), num_samples=count, gen_length=LENGTH),
        arms,
        FORWARDS[:1] if args.quick else args.forwards,
        list(range(seeds)),
        out_dir=args.out,
        task_name=f"{count} texts of {LENGTH} tokens, {args.dtype} "
        f"[{pipeline_fingerprint(pipe, *folder_contents(bundled('text')))}]",
        models=models,
        quality="ngram_js",
        higher_is_better=False,
        reference="MDLM",
    )
    result = {"settings": {"num_samples": count, "dtype": args.dtype}, **origin(args.device), **found}
    print(docs_table(result))
    return give(result, args.table)


if __name__ == "__main__":
    sys.exit(main())
