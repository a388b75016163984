"""Which decoding rule writes the best antibodies, at equal forward passes, with a model that others made (AntiBERTy)?

Held fixed: model, sequences, which residues are masked, forward passes, temperature, one random generator a sequence.
Varied: the rule. Measured for each sequence: share of the masked residues that come back ("recovery"), and the mean
log-probability of the written ones given all others, every --stride-th of them hidden at once ("likelihood"); for each
arm the share of different 3-mers ("distinct"), beside that of the real sequences. Then, with one residue of each
sequence replaced: AUROC within a sequence, and how often the worst residue is the planted one, by the model's own
probability, by leaving one out, and by each head.
Every cell is kept in --work, so that a run that broke off goes on. Intervals are over sequences, differences paired.
The last line of stdout is one JSON object; --table writes it to a file.
Usage:
    python -m benchmarks.proteins MODEL TEST.fasta [MORE.fasta] [--quick] [--quality-head NAME=FOLDER ...]
        [--work FILE] [--table FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.antibodies import heavy_chains, regions
from benchmarks.shared import files_fingerprint, origin
from prism_pipelines import PrismPipeline, schedulers
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import bootstrap_interval, distinct_n
from prism_pipelines.evaluation.figure_style import GREY, new_figure, save_figure, styled
from prism_pipelines.evaluation.statistics import tabulate
from prism_pipelines.evaluation.tables import markdown_table

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
KINDS = ("30", "60", "90", "H3", "nothing")  # per cent of the residues, the loop alone, or all but the first
SHARE = {"eta": 0.1}  # of the visible tokens that a rule takes back in a step; the same for all that have such a share
ARMS = {  # name: scheduler, settings, whether it needs a head
    "MDLM, random": ("MDLMScheduler", {"order": "random"}, False),
    "MDLM, confidence order": ("MDLMScheduler", {"order": "confidence"}, False),
    "self-confidence": ("SelfConfidenceScheduler", SHARE, False),
    "prompt probability": ("PromptConfidenceScheduler", SHARE, False),
    "draw probability": ("DrawConfidenceScheduler", SHARE, False),
    "token-to-mask": ("TokenToMaskScheduler", {}, False),
    "ReMDM": ("ReMDMScheduler", {}, False),
    "PRISM": ("PrismScheduler", SHARE, True),
    "judge and repair": ("JudgeAndRepairScheduler", {}, True),
}
BEST_OF = "best of 4 by own probability"  # four samples in confidence order, a quarter of the passes each
REFERENCE = "MDLM, confidence order"


def masked_positions(sequence: str, kind: str, seed: int) -> list[int]:
    """Which residues of a sequence are to be filled; the same for every arm."""
    if kind == "H3":
        return list(regions(sequence)["H3"])
    if kind == "nothing":
        return list(range(1, len(sequence)))
    choice = random.Random(f"{seed} {kind} {sequence}")
    return sorted(choice.sample(range(len(sequence)), max(1, round(int(kind) / 100 * len(sequence)))))


def masked(sequence: str, places: list[int], mask: str) -> str:
    """The sequence with mask tokens."""
    hidden = set(places)
    return "".join(mask if i in hidden else letter for i, letter in enumerate(sequence))


def arms_of(heads: dict[str, str]) -> dict[str, tuple]:
    """Name of an arm -> (scheduler, settings, name of the head or None)."""
    arms = {}
    for name, (kind, settings, needs_head) in ARMS.items():
        if needs_head:
            arms |= {f"{name}, {head}": (kind, settings, head) for head in heads}
        else:
            arms[name] = (kind, settings, None)
    return arms | {BEST_OF: ("MDLMScheduler", {"order": "confidence"}, None)}


@torch.no_grad()
def likelihood(pipe, texts: list[str], places: list[list[int]], stride: int, batch_size: int) -> list[float]:
    """Mean log-probability of the residues at `places` of each text, every stride-th of them hidden at once."""
    jobs = [(row, where[start::stride]) for row, where in enumerate(places) for start in range(min(stride, len(where)))]
    sums, opening = [0.0] * len(texts), len(pipe.text_frame.opening)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        read = pipe.tokenizer([texts[row] for row, _ in batch], return_tensors="pt", padding=True)
        hide = torch.zeros_like(read.input_ids, dtype=torch.bool)
        for i, (_, where) in enumerate(batch):
            hide[i, torch.tensor(where) + opening] = True
        hidden = pipe.denoiser.hidden(read.input_ids.masked_fill(hide, pipe.mask_token_id), read.attention_mask)
        index = hide.nonzero(as_tuple=True)
        log_probs = pipe.denoiser.logits_at(hidden, *index).float().log_softmax(-1)
        chosen = log_probs.gather(-1, read.input_ids[index][:, None])[:, 0].tolist()
        for i, value in zip(index[0].tolist(), chosen, strict=True):
            sums[batch[i][0]] += value
    return [total / len(where) for total, where in zip(sums, places, strict=True)]


def write(pipe, arm: tuple, name: str, texts: list[str], forwards: int, heat: float, seed: int) -> tuple[list, list]:
    """The filled texts, and forward passes of each."""
    kind, settings, head = arm
    if head is not None:
        pipe.set_quality_head(head)
    pipe.scheduler = getattr(schedulers, kind)(**settings, temperature=heat)
    times, steps = (4, max(1, forwards // 4 - 1)) if name == BEST_OF else (1, forwards)
    seeds = [random.Random(f"{seed} {text} {k}").getrandbits(32) for text in texts for k in range(times)]
    each = [torch.Generator().manual_seed(one) for one in seeds]
    out = pipe(infill=texts, num_samples=times, num_inference_steps=steps, generator=each)
    if times == 1:
        return out.texts, out.nfe_per_row
    quality, ids, _ = pipe.score(out.texts, by="own")
    written = torch.stack([ids[i] != row for i, row in enumerate(masked_ids(pipe, texts, times, ids.shape[1]))])
    mean = (quality.log() * written).sum(-1) / written.sum(-1)
    best = mean.view(-1, times).argmax(-1) + torch.arange(len(texts)) * times
    return [out.texts[i] for i in best.tolist()], [times * (steps + 1)] * len(texts)


def masked_ids(pipe, texts: list[str], times: int, length: int) -> torch.Tensor:
    """Ids of the masked texts, each `times` times, padded."""
    read = pipe.tokenizer(texts, return_tensors="pt", padding="max_length", max_length=length)
    return read.input_ids.repeat_interleave(times, 0)


def run_cell(pipe, arm: tuple, name: str, cell: dict, sequences: list[str], args) -> dict:
    """One arm on all sequences: recovery and likelihood of each, and what was written."""
    began, written, nfe = time.perf_counter(), [], []
    places = [masked_positions(sequence, cell["kind"], cell["seed"]) for sequence in sequences]
    texts = [masked(one, where, pipe.tokenizer.mask_token) for one, where in zip(sequences, places, strict=True)]
    for start in range(0, len(texts), args.batch_size):
        some = texts[start : start + args.batch_size]
        done = write(pipe, arm, name, some, cell["forwards"], cell["temperature"], cell["seed"])
        written, nfe = written + done[0], nfe + done[1]
    right = [
        float(np.mean([new[i] == old[i] for i in where]))
        for new, old, where in zip(written, sequences, places, strict=True)
    ]
    found = {"recovery": right, "likelihood": likelihood(pipe, written, places, args.stride, args.batch_size)}
    return cell | {"arm": name, **found, "nfe": nfe, "texts": written, "seconds": time.perf_counter() - began}


def pieces(texts: list[str], kind: str, sequences: list[str]) -> list[str]:
    """What diversity is measured on: whole chains, or their loops."""
    if kind != "H3":
        return texts
    spans = [regions(sequence)["H3"] for sequence in sequences]
    return [text[span.start : span.stop] for text, span in zip(texts, spans, strict=True)]


# --- planted mutations ------------------------------------------------------------------------------------------------


def planted(sequences: list[str], copies: int, seed: int) -> list[tuple[str, int]]:
    """Each sequence `copies` times with another residue at one place, and the place."""
    made = []
    for sequence in sequences:
        choice = random.Random(f"{seed} {sequence}")
        for place in choice.sample(range(len(sequence)), copies):
            other = choice.choice([letter for letter in RESIDUES if letter != sequence[place]])
            made.append((sequence[:place] + other + sequence[place + 1 :], place))
    return made


def detect(pipe, by: str, mutants: list[tuple[str, int]], batch_size: int) -> dict:
    """AUROC of the planted residue within its sequence, and whether it is the worst, for each mutant."""
    opening, ranks, worst = len(pipe.text_frame.opening), [], []
    for start in range(0, len(mutants), batch_size):
        batch = mutants[start : start + batch_size]
        quality, _, _ = pipe.score([text for text, _ in batch], by=by)
        for row, (text, place) in zip(quality.tolist(), batch, strict=True):
            scores = row[opening : opening + len(text)]
            others = scores[:place] + scores[place + 1 :]
            below = sum(scores[place] < other for other in others) + sum(scores[place] == other for other in others) / 2
            ranks.append(below / len(others))
            worst.append(scores[place] < min(others))
    return {"auroc": ranks, "worst": worst}


def detection_rows(pipe, heads: dict, sequences: list[str], args) -> list[dict]:
    """What finds planted mutations, and in how many forward passes of a sequence."""
    mutants, rows = planted(sequences, args.copies, 0), []
    ways = [("own probability", "own", None), ("leave one out", "leave_one_out", None)]
    ways += [(f"head: {name}", "head", name) for name in heads]
    for title, by, head in ways:
        if head is not None:
            pipe.set_quality_head(head)
        chosen = mutants[: args.left_out] if by == "leave_one_out" else mutants
        found = detect(pipe, by, chosen, args.batch_size)
        low, high = bootstrap_interval(found["auroc"]) or (None, None)
        row = {"by": title, "n": len(chosen), "auroc": float(np.mean(found["auroc"])), "low": low, "high": high}
        length = round(np.mean([len(text) for text, _ in chosen]))
        row |= {"worst": float(np.mean(found["worst"])), "forwards": length if by == "leave_one_out" else 1}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


# --- the table --------------------------------------------------------------------------------------------------------


def summary(found: list[dict], arms: list[str], sequences: list[str], seeds: list[int]) -> list[dict]:
    """A row for each kind, forward passes, temperature and arm: means, intervals, the difference from REFERENCE."""
    rows = []
    settings = list(dict.fromkeys((cell["kind"], cell["forwards"], cell["temperature"]) for cell in found))
    for setting in settings:
        kind, forwards, heat = setting
        some = [cell for cell in found if (cell["kind"], cell["forwards"], cell["temperature"]) == setting]
        by_arm = {(cell["arm"], cell["seed"]): cell for cell in some}
        present = [arm for arm in arms if all((arm, seed) in by_arm for seed in seeds)]
        real = distinct_n(pieces(sequences, kind, sequences), 3)
        cells = {
            (arm, forwards, seed): {name: by_arm[arm, seed][name] for name in ("recovery", "likelihood")}
            for arm in present
            for seed in seeds
        }
        values, pairs = tabulate(cells, present, [forwards], seeds, REFERENCE)
        for arm in present:
            row = {"kind": kind, "forwards": forwards, "temperature": heat, "arm": arm}
            for one in (one for one in values if one["arm"] == arm):
                row[one["metric"]] = [one["value"], one["low"], one["high"]]
            for one in (one for one in pairs if one["arm"] == arm):
                row[f"{one['metric']}_difference"] = [one["difference"], one["low"], one["high"]]
            texts = [by_arm[arm, seed]["texts"] for seed in seeds]
            row["distinct"] = float(np.mean([distinct_n(pieces(one, kind, sequences), 3) for one in texts]))
            row |= {"distinct_real": real, "mean_nfe": float(np.mean([by_arm[arm, seed]["nfe"] for seed in seeds]))}
            rows.append(row)
    return rows


def markdown(result: dict) -> str:
    """The tables of the docs."""
    n, seeds = result["settings"]["n"], len(result["settings"]["seeds"])
    lines = [
        f"{n} sequences, {seeds} seed{'s' if seeds > 1 else ''}, paired. In brackets 95 % over sequences; differences "
        f"are those of recovery from {REFERENCE}.",
        "",
    ]
    recovered = []
    for row in result["rows"]:
        value, low, high = row["recovery"]
        apart = row.get("recovery_difference")
        apart = "" if apart is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*apart)
        diversity = f"{row['distinct']:.2f} ({row['distinct_real']:.2f})"
        cells = [row["kind"], row["forwards"], f"{row['temperature']:g}", row["arm"]]
        cells += [f"{value:.3f} ({low:.3f}-{high:.3f})", apart, f"{row['likelihood'][0]:.2f}", diversity]
        recovered.append([*cells, f"{row['mean_nfe']:.1f}"])
    planted = []
    for row in result["planted"]:
        interval = "" if row["low"] is None else f" ({row['low']:.3f}-{row['high']:.3f})"
        auroc, worst = f"{row['auroc']:.3f}{interval}", f"{row['worst']:.2f}"
        planted.append([row["by"], row["n"], auroc, worst, row["forwards"]])
    header = ["masked", "passes", "T", "rule", "recovery", "difference", "log p", "3-mers (real)", "mean passes"]
    lines += [markdown_table(header, recovered), ""]
    header = ["planted mutations, by", "n", "AUROC in the sequence", "the worst residue is the planted one", "passes"]
    return "\n".join([*lines, markdown_table(header, planted)]) + "\n"


def draw(result: dict, path) -> None:
    """Recovery with its interval and diversity of every arm at T = 1 in 16 passes, a panel for each kind of mask."""
    rows = [row for row in result["rows"] if (row["forwards"], row["temperature"]) == (16, 1.0)]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    titles = {"H3": "CDR-H3 masked", "nothing": "all but the first residue masked"}
    with styled():
        figure, axes = new_figure(len(kinds))
        for axis, kind in zip(axes, kinds, strict=True):
            some = [row for row in rows if row["kind"] == kind][::-1]
            for height, row in enumerate(some):
                value, low, high = row["recovery"]
                axis.plot([low, high], [height, height], color=GREY, linewidth=2, zorder=1)
                axis.plot(
                    value,
                    height,
                    "o",
                    color="#0072B2",
                    zorder=2,
                    label="residues that come back" if not height else None,
                )
                label = "different 3-mers" if not height else None
                axis.plot(row["distinct"], height, "x", color="#D55E00", zorder=2, label=label)
            real = some[0]["distinct_real"]
            axis.axvline(real, color="#D55E00", linestyle=":", linewidth=1, label="3-mers of the real sequences")
            axis.set_yticks(range(len(some)), [row["arm"] for row in some])
            axis.set_title(titles.get(kind, f"{kind} % masked"))
        marks, names = axes[0].get_legend_handles_labels()
        figure.legend(marks, names, fontsize=8, loc="outside lower center", ncols=3)
        save_figure(figure, path)


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that `prism convert` wrote")
    parser.add_argument("test", nargs="+", help="FASTA of heavy chains")
    parser.add_argument("--quick", action="store_true", help="few sequences and settings, in minutes")
    parser.add_argument("--quality-head", action="append", default=[], metavar="NAME=FOLDER", help="may be given again")
    parser.add_argument("--num-sequences", type=int, help="of each file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--forwards", nargs="+", type=int)
    parser.add_argument("--temperatures", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="of those that the docs' table names")
    parser.add_argument("--stride", type=int, help="residues hidden at once for the likelihood are every stride-th")
    parser.add_argument("--copies", type=int, help="mutants of each sequence")
    parser.add_argument("--left-out", type=int, help="mutants that are scored by leaving one out")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cells", type=Path, help="JSON lines of finished cells")
    parser.add_argument("--table", type=Path, help="write the JSON there, and the tables beside it as .md")
    args = parser.parse_args(argv)
    quick = {"num_sequences": 6, "kinds": ["90", "H3"], "forwards": [16], "temperatures": [1.0], "seeds": [0, 1]}
    quick |= {"stride": 4, "copies": 2, "left_out": 6}
    whole = {"num_sequences": 48, "kinds": list(KINDS), "forwards": [8, 16, 32], "temperatures": [0.0, 1.0]}
    whole |= {"seeds": [0, 1], "stride": 16, "copies": 4, "left_out": 48}
    for name, value in (quick if args.quick else whole).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if any("=" not in one for one in args.quality_head):
        parser.error("--quality-head is NAME=FOLDER")
    return args


def main(argv=None) -> int:
    """Run every cell that is not done, then the planted mutations, and print the table. Returns the exit status."""
    args = parse_args(argv)
    pipe = PrismPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    heads = dict(one.split("=", 1) for one in args.quality_head)
    for name, folder in heads.items():
        pipe.load_quality_head(folder, name=name)
    sequences = [text for file in args.test for text in heavy_chains(file)[: args.num_sequences]]
    arms = {name: arm for name, arm in arms_of(heads).items() if args.arms is None or name in args.arms}
    settings = {"test": sequences, "stride": args.stride, "dtype": args.dtype}
    stamp = files_fingerprint(Path(args.model), settings)
    stamps = {name: files_fingerprint(Path(heads[arm[2]]), settings) if arm[2] else stamp for name, arm in arms.items()}
    known = (
        [json.loads(line) for line in args.cells.read_text().splitlines()] if args.cells and args.cells.exists() else []
    )
    found, started = [], time.perf_counter()
    for kind in args.kinds:
        for forwards in args.forwards:
            for heat in args.temperatures:
                for seed in args.seeds:
                    cell = {"kind": kind, "forwards": forwards, "temperature": heat, "seed": seed}
                    for name, arm in arms.items():
                        mark = cell | {"arm": name, "stamp": stamp + stamps[name]}
                        done = next((one for one in known if mark.items() <= one.items()), None)
                        if done is None:
                            done = run_cell(pipe, arm, name, cell, sequences, args) | {"stamp": mark["stamp"]}
                            if args.cells:
                                with args.cells.open("a") as file:
                                    file.write(json.dumps(done) + "\n")
                        found.append(done)
                        told = (
                            f"{np.mean(done['recovery']):.3f} {np.mean(done['likelihood']):.2f} {done['seconds']:.0f} s"
                        )
                        print(
                            f"{kind:8} {forwards:3} T={heat:g} seed {seed} {name:36} {told}",
                            file=sys.stderr,
                            flush=True,
                        )
    rows = detection_rows(pipe, heads, sequences, args)
    names = ("kinds", "forwards", "temperatures", "seeds", "stride", "copies", "left_out", "dtype")
    shown = {name: getattr(args, name) for name in names} | {"n": len(sequences), "heads": sorted(heads)}
    table = summary(found, list(arms), sequences, args.seeds)
    result = {"settings": shown, "fingerprint": stamp, **origin(), "rows": table, "planted": rows}
    result["seconds"] = round(time.perf_counter() - started)
    if args.table:
        args.table.write_text(json.dumps(result, indent=1) + "\n")
        args.table.with_suffix(".md").write_text(markdown(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
