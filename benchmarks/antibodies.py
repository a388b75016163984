"""Heavy chains of antibodies for `benchmarks.proteins`: check a converted model on known ones, and sample new ones.

Usage:
    python -m benchmarks.antibodies verify MODEL examples/antibody/therapeutic.fasta
    python -m benchmarks.antibodies sample MODEL FOLDER [--num-sequences 96] [--num-inference-steps 32] [--seed 0]

`verify` masks 15 % of the framework residues and counts how many the model recovers, by regions of each chain. `sample`
draws chains from the model itself, slowly, so that the study needs no data with a licence: FOLDER gets train.fasta and
test.fasta, which share no CDR-H3. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

import torch

from benchmarks.shared import origin
from prism_pipelines import MDLMScheduler, PrismPipeline
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.generation.sequences import read_fasta

# Anchors of a heavy chain: C22 and W36 around CDR-H1, W36 and the R/K of FR3 around H2, C92 and W103-G-x-G around H3.
# CDR-H1 is that of AbM (26 to 35), H2 of Kabat (50 to 65), H3 of Chothia with 93 and 94.
CHAIN = re.compile(
    r"^[A-Z]{18,25}C[A-Z]{3}(?P<H1>[A-Z]{8,14}?)W[A-Z]{13}(?P<H2>[A-Z]{14,21}?)"
    r"[RKQ][FVLIA][TISAV][A-Z]{23,27}C(?P<H3>[A-Z]{4,34}?)W[GA][A-Z]G[A-Z]{5,9}$"
)
# Given, so that what is sampled is a heavy chain: how chains of human and murine families begin, and FR4.
BEGINNINGS = (
    "EVQLVESGGG", "QVQLVESGGG", "QVQLVQSGAE", "QVQLQESGPG", "EVQLLESGGG", "QVTLKESGPA", "QVQLQQSGAE", "EVQLQQSGPE",
)  # fmt: skip
END = "WGQGTLVTVSS"
LENGTHS = range(115, 127)
SAME = 0.7  # two CDR-H3 are of one cluster if they share more than this of the longer one's residues


def regions(sequence: str) -> dict[str, range] | None:
    """Where CDR-H1, H2 and H3 stand in a heavy chain; None for what does not look like a whole one."""
    found = CHAIN.match(sequence)
    return None if found is None else {name: range(*found.span(name)) for name in ("H1", "H2", "H3")}


def heavy_chains(file) -> list[str]:
    """The whole heavy chains of a FASTA file; what else is in it is named."""
    found = []
    for row in read_fasta(file):
        if row["text"] is None or regions(row["text"]) is None:
            print(f"{file}, line {row['line']}: no whole heavy chain, left out", file=sys.stderr)
        else:
            found.append(row["text"])
    return found


def framework(sequence: str) -> list[int]:
    """Positions outside the CDRs."""
    inside = {i for place in regions(sequence).values() for i in place}
    return [i for i in range(len(sequence)) if i not in inside]


def loop(sequence: str) -> str:
    """The residues of CDR-H3."""
    place = regions(sequence)["H3"]
    return sequence[place.start : place.stop]


def identity(one: str, other: str) -> float:
    """Share of the longer loop's residues that stand in the other, in order (longest common subsequence)."""
    row = [0] * (len(other) + 1)
    for a in one:
        before = row[:]
        for j, b in enumerate(other, 1):
            row[j] = before[j - 1] + 1 if a == b else max(before[j], row[j - 1])
    return row[-1] / max(len(one), len(other))


def clusters(sequences: list[str]) -> list[list[int]]:
    """Single-linkage clusters by CDR-H3, in order of their first member: across two of them no loops are alike."""
    group = list(range(len(sequences)))
    loops = [loop(sequence) for sequence in sequences]
    for i in range(len(loops)):
        for j in range(i):
            if group[i] != group[j] and identity(loops[i], loops[j]) > SAME:
                group = [group[j] if g == group[i] else g for g in group]
    return [[i for i, g in enumerate(group) if g == name] for name in dict.fromkeys(group)]


@torch.no_grad()
def recovered(pipe, sequence: str, share: float, rounds: int, seed: int) -> tuple[int, int]:
    """Framework residues that the model names rightly when a share of them is masked at once, and how many were."""
    ids = pipe.tokenizer(sequence, return_tensors="pt").input_ids.repeat(rounds, 1)
    opening = len(pipe.text_frame.opening)
    maskable = torch.zeros(ids.shape[1], dtype=torch.bool)
    maskable[torch.tensor(framework(sequence)) + opening] = True
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share) & maskable
    hidden = pipe.denoiser.hidden(ids.masked_fill(chosen, pipe.mask_token_id))
    named = pipe.denoiser.logits_at(hidden, *chosen.nonzero(as_tuple=True)).argmax(-1)
    return int((named == ids[chosen]).sum()), int(chosen.sum())


def verify(pipe, file: str, share: float, rounds: int, seed: int) -> dict:
    """Recovery of framework residues, by chain and in all."""
    rows = []
    for text in heavy_chains(file):
        right, masked = recovered(pipe, text, share, rounds, seed)
        rows.append({"loop": loop(text), "right": right, "masked": masked})
        print(f"{loop(text):28} {right / masked:.3f} of {masked}", file=sys.stderr)
    right, masked = (sum(row[name] for row in rows) for name in ("right", "masked"))
    return {"share": share, "rounds": rounds, "seed": seed, "recovered": right / masked, "masked": masked, "rows": rows}


def sample(pipe, total: int, steps: int, batch_size: int, seed: int) -> list[str]:
    """Different whole heavy chains, drawn in random order at temperature 1, a few residues in each forward pass."""
    pipe.scheduler, found, drawn = MDLMScheduler(order="random", temperature=1.0), {}, 0
    while len(found) < total:
        choice = random.Random(seed * 100_003 + drawn)
        starts = [choice.choice(BEGINNINGS) for _ in range(batch_size)]
        masks = [choice.choice(LENGTHS) - len(start) - len(END) for start in starts]
        texts = [start + pipe.tokenizer.mask_token * n + END for start, n in zip(starts, masks, strict=True)]
        each = [torch.Generator().manual_seed(seed * 100_003 + drawn + i) for i in range(batch_size)]
        for text in pipe(infill=texts, num_inference_steps=steps, generator=each).texts:
            if regions(text) is not None:
                found.setdefault(text)
        drawn += batch_size
        print(f"{len(found)} whole chains of {drawn} drawn", file=sys.stderr, flush=True)
    return list(found)[:total]


def split(sequences: list[str], num_test: int) -> tuple[list[str], list[str]]:
    """Train and test sequences; whole clusters of CDR-H3 go to one of them, the smallest clusters to the test."""
    train, test = [], []
    for members in sorted(clusters(sequences), key=len):
        test_has_room = len(test) + len(members) <= num_test
        (test if test_has_room else train).extend(sequences[i] for i in members)
    return train, test


def write_fasta(path: Path, sequences: list[str], name: str) -> None:
    """Sequences under numbered names."""
    path.write_text("".join(f">{name}-{i:04d}\n{text}\n" for i, text in enumerate(sequences)))


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verify", "sample"])
    parser.add_argument("model", help="folder that `prism convert` wrote")
    parser.add_argument("place", help="verify: FASTA file; sample: folder to write")
    parser.add_argument("--share", type=float, default=0.15, help="verify: masked framework (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=24, help="verify: maskings of a chain (default: %(default)s)")
    parser.add_argument("--num-sequences", type=int, default=96)
    parser.add_argument("--num-test", type=int, default=48)
    parser.add_argument("--num-inference-steps", type=int, default=32, help="of a chain (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Verify or sample. Returns the exit status."""
    args = parse_args(argv)
    dtype = getattr(torch, args.dtype)
    pipe = PrismPipeline.from_pretrained(args.model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if args.what == "verify":
        result = verify(pipe, args.place, args.share, args.rounds, args.seed)
    else:
        sequences = sample(pipe, args.num_sequences, args.num_inference_steps, args.batch_size, args.seed)
        train, test = split(sequences, args.num_test)
        folder = Path(args.place)
        folder.mkdir(parents=True, exist_ok=True)
        write_fasta(folder / "train.fasta", train, "train")
        write_fasta(folder / "test.fasta", test, "test")
        result = {"train": len(train), "test": len(test), "steps": args.num_inference_steps, "seed": args.seed}
    print(json.dumps(result | origin()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
