"""The pictures of docs/concepts.md: two worlds small enough to list in full, and one real run.

Usage: python -m benchmarks.concepts [--run]   (--run: make the run of the third picture and its JSON again; seconds)
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict

from benchmarks.shared import ROOT
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.figure_style import ARM_LOOKS, GREY, INK, new_figure, save_figure, styled

FIGURES = ROOT / "docs" / "figures"
BLUE, ORANGE = ARM_LOOKS["PRISM"][0], ARM_LOOKS["judge and repair"][0]
# How often each sentence is said; every other sentence of these words never is.
SENTENCES = {
    "the cat sat": 24, "the cat ran": 14, "the dog sat": 12, "the dog ran": 20, "a cat sat": 8, "a dog ran": 10,
    "a cat ran": 4, "a dog sat": 3, "the sun rose": 26, "the sun sat": 1,
}  # fmt: skip
# A topic is told by a prompt that is right this often; each of the tokens that follow is of the topic this often.
PROMPT_RIGHT, TOKEN_RIGHT, LENGTH = 0.9, 0.85, 5
CLUES, CHOSEN = 25, 11  # a run with several repairs


def quality(world: dict, y: tuple, i: int) -> float:
    """p(x_i = y_i | all other tokens of y), by counting."""
    others = {x: p for x, p in world.items() if all(x[j] == y[j] for j in range(len(y)) if j != i)}
    return others.get(y, 0) / sum(others.values())


def quality_picture(path) -> None:
    """Sentences as cells: each word with its exact quality."""
    world = {tuple(sentence.split()): n for sentence, n in SENTENCES.items()}
    shown = ["the cat sat", "the sun rose", "the sun sat", "a dog sat"]
    bins = [
        "#f28e2b",
        "#f5a04b",
        "#f7b36e",
        "#f9c795",
        "#fbdbbb",
        "#f1e7dc",
        "#e6edf3",
        "#d3e3f3",
        "#bdd7f1",
        "#a6caef",
    ]
    with styled():
        figure, (axis,) = new_figure(1, size=(5.2, 2.9))
        for row, sentence in enumerate(shown):
            y = tuple(sentence.split())
            for i, word in enumerate(y):
                value = quality(world, y, i)
                axis.add_patch(_box(i, -row, bins[min(9, int(10 * value))]))
                axis.text(i + 0.47, -row + 0.56, word, ha="center", va="center", fontsize=11)
                axis.text(i + 0.47, -row + 0.22, f"{value:.2f}", ha="center", va="center", fontsize=8)
            axis.text(3.1, -row + 0.42, f"{SENTENCES[sentence]} of {sum(SENTENCES.values())}", va="center")
        axis.set(xlim=(-0.05, 5), ylim=(-len(shown) + 0.9, 1))
        axis.set_title("P(this word | the other two), counted", loc="left")
        axis.axis("off")
        save_figure(figure, path)


def _box(x: float, y: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.94, 0.84, facecolor=colour, edgecolor="white")


def runs() -> dict:
    """{(y, i): (mass, one-step quality, p(y_i | prompt), P(right))} over all texts that an ideal model writes.

    The truth x and the text y that is written both follow the prompt "A"; a token is right if it is that of the truth.
    """
    letters = {topic: [TOKEN_RIGHT if token == topic else 1 - TOKEN_RIGHT for token in "AB"] for topic in "AB"}
    world = defaultdict(float)
    for topic, tokens in itertools.product("AB", itertools.product("AB", repeat=LENGTH)):
        p = PROMPT_RIGHT if topic == "A" else 1 - PROMPT_RIGHT
        for token in tokens:
            p *= letters[topic]["AB".index(token)]
        world[tokens] += p
    mass, right = defaultdict(float), defaultdict(float)
    for (y, p_y), (x, p_x) in itertools.product(world.items(), world.items()):
        for i in range(LENGTH):
            mass[y, i] += p_y * p_x
            right[y, i] += p_y * p_x * (x[i] == y[i])
    return {
        (y, i): (
            mass[y, i],
            quality(world, y, i),
            sum(p for x, p in world.items() if x[i] == y[i]),
            right[y, i] / mass[y, i],
        )
        for y, i in mass
    }


def run_picture(path) -> None:
    """What a one-step head would say, and what the run knew, each against how often the token is right."""
    found = list(runs().values())
    with styled():
        figure, axes = new_figure(2, size=(4, 3.8))
        panels = (
            (1, "quality: does it fit the others?", "p(token | all other tokens)"),
            (2, "what the run knew: its prompt", "p(token | the prompt alone)"),
        )
        for axis, (column, title, label) in zip(axes, panels, strict=True):
            at = defaultdict(float)
            for cell in found:
                at[round(cell[column], 9), round(cell[3], 9)] += cell[0]
            axis.plot([0, 1], [0, 1], color=GREY, linestyle=":")
            area = [20 + 1600 * mass / sum(at.values()) for mass in at.values()]
            colour = ORANGE if column == 1 else BLUE
            axis.scatter(*zip(*at, strict=True), s=area, color=colour, alpha=0.75, edgecolor="white", clip_on=False)
            axis.set(title=title, xlabel=label, ylabel="how often the token is right", xlim=(0, 1), ylim=(0, 1))
        save_figure(figure, path)


def real_run() -> dict:
    """One run of judge and repair on a puzzle of 25 clues, by the bundled model and the head that knows the run."""
    import torch

    from prism_pipelines import PrismPipeline, bundled, sudoku

    pipe = PrismPipeline.from_pretrained(bundled("sudoku"), quality_head=bundled("sudoku-head"))
    puzzle = sudoku.make_puzzles(24, CLUES, seed=7)[0][CHOSEN]
    run = {"infill": torch.as_tensor(sudoku.to_ids(puzzle))[None], "num_inference_steps": 60}
    run["generator"] = torch.Generator().manual_seed(CHOSEN)
    out = pipe(**run, return_trace=True)
    steps, generated = [], out.trace.generated[0]
    before = out.trace.start[0]
    for step in out.trace:
        written = generated & (before != out.trace.mask_token_id)
        seen = step.quality[0][written]
        steps.append(
            {
                "visible": int((generated & (step.sample[0] != out.trace.mask_token_id)).sum()),
                "remasked": int(step.remasked[0].sum()),
                "verdict": step.verdicts[0],
                "lowest": None if not len(seen) else round(float(seen.min()), 4),
            }
        )
        before = step.sample[0]
    solved = bool(sudoku.is_solved(out.sequences.numpy(), puzzle[None])[0])
    facts = {"puzzle": sudoku.format_grid(puzzle), "seed": CHOSEN, "total": int(generated.sum()), "nfe": out.nfe}
    return facts | {"solved": solved, "confidence": round(float(out.confidence[0]), 4), "steps": steps}


def repair_picture(run: dict, path) -> None:
    """Cells that are visible after every forward pass, and what was judged."""
    steps, total = run["steps"], run["total"]
    with styled():
        figure, (axis,) = new_figure(1, size=(7, 3.4))
        axis.plot(range(len(steps) + 1), [0, *(step["visible"] for step in steps)], color=BLUE, linewidth=1.8)
        judged = [(n, step) for n, step in enumerate(steps, 1) if step["verdict"] is not None]
        for k, (n, step) in enumerate(judged):  # texts alternate in height, so that none lies on another
            good = step["verdict"] == "accepted"
            text = f"{step['verdict']}" if good else f"{step['verdict']} {step['remasked']}"
            axis.scatter([n - 1], [total], color=BLUE if good else ORANGE, marker="o" if good else "D", zorder=3, s=45)
            axis.annotate(
                f"{text}\nlowest {step['lowest']:.2f}", (n - 1, total), xytext=(0, 8 + 26 * (k % 2)),
                textcoords="offset points",
                fontsize=8, va="bottom", ha="center", color=BLUE if good else ORANGE,
            )  # fmt: skip
        axis.set(xlabel="forward passes", ylabel=f"cells filled, of {total}", ylim=(0, total * 1.42))
        axis.set_xlim(0, len(steps) + 1)
        axis.text(2.5, total * 0.3, "fill", color=INK, fontsize=9)
        axis.set_title("Fill, judge the whole, repair what is doubted, until nothing is worth it", loc="left")
        save_figure(figure, path)


def main() -> None:
    """Draw the three pictures."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the run of the third picture again")
    path = FIGURES / "concepts_repair.json"
    if parser.parse_args().run:
        path.write_text(json.dumps(real_run(), indent=1) + "\n")
    draw()


def draw() -> None:
    """The pictures, from what is listed and from the committed run."""
    quality_picture(FIGURES / "concepts_quality.png")
    run_picture(FIGURES / "concepts_run.png")
    repair_picture(json.loads((FIGURES / "concepts_repair.json").read_text()), FIGURES / "concepts_repair.png")


if __name__ == "__main__":
    main()
