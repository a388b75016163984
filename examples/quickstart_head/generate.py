"""Sentences written with a shared head, and how many of them are true.

    python examples/quickstart_head/generate.py me/counting-mdm-prism [--num-samples 64]

The same model without remasking, at as many forwards, stands beside it.
"""

import argparse
import sys
from pathlib import Path

import torch

from prism_pipelines import MDLMScheduler, PrismPipeline

sys.path.insert(0, str(Path(__file__).parent))
from prepare import sentence


def true_share(texts: list[str]) -> tuple[int, int]:
    """(sentences that are true, sentences); what is before the first end token and after the last is left out."""
    known = {sentence(a, b) for a in range(7) for b in range(7)}
    found = [part for text in texts for part in text.split("<eos>")[1:-1]]
    return sum(" ".join(part.split()) in known for part in found), len(found)


def main() -> None:
    """Write, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head", help="Hub id or folder of the head")
    parser.add_argument("--num-samples", type=int, default=64)
    args = parser.parse_args()
    pipe = PrismPipeline.from_pretrained(args.head)
    pipe.set_progress_bar_config(disable=True)
    for name, scheduler in (("with the head", pipe.scheduler), ("without remasking", MDLMScheduler())):
        pipe.scheduler = scheduler
        noise = torch.Generator().manual_seed(0)
        out = pipe(num_samples=args.num_samples, gen_length=48, num_inference_steps=48, generator=noise)
        whole = [pipe.tokenizer.decode(row) for row in out.sequences]  # `texts` stop at the first end token
        right, count = true_share(whole)
        print(f"{name}: {right} of {count} sentences are true")
        print(f"    {whole[0][:110]}")


if __name__ == "__main__":
    main()
