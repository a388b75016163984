"""How well scores find the wrong tokens of a half-written canvas: within a row, over all, and of the row as a whole.

Remasking ranks the tokens of one row, so that is what counts for it; whether a finished row may be accepted is another
question; and a bar on the quality is a third, which calibration answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sudoku import calibration

LOWEST = 8  # tokens that a step would remask
# What remasking rules may read without any training: `RunContext` fields.
FREE_SCORES = {"own": "own_logprob", "prompt": "prompt_logprob", "draw": "draw_logprob"}
NAMES = {
    "head": "this head",
    "own": "the model's probability of the token now (free)",
    "prompt": "its probability on the first canvas (free)",
    "draw": "its probability when it was drawn (free)",
}
TITLES = {"within": "AUROC within a row", "pooled": "AUROC, all tokens", "row": "AUROC, row has no error", "ece": "ECE"}
TITLES |= {"overlap": f"of its {LOWEST} lowest, true ones", "rank": "rank correlation"}


@dataclass(frozen=True)
class JudgedRow:
    """The judged tokens of one row in one state of a run. Arrays have shape (N,).

    Args:
        scores: by name; higher means more likely right.
        right: bool; or the probability in [0, 1] that a token is right, where that is what is known.
        fill: share of the generated tokens that are visible.
        age: forward passes since each token was drawn.
        kind: what the row is of, such as a number of clues.
    """

    scores: dict[str, np.ndarray]
    right: np.ndarray
    fill: float
    age: np.ndarray
    kind: str = ""


def auroc(score, right) -> float:
    """Chance that a right token scores higher than a wrong one, ties half; NaN where there is only one kind."""
    score, right = np.asarray(score, dtype=float), np.asarray(right, dtype=bool)
    if right.all() or not right.any():
        return float("nan")
    _, group, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[group]
    above = rank[right].sum() - right.sum() * (right.sum() + 1) / 2
    return float(above / (right.sum() * (~right).sum()))


def overlap(score, truth, count: int = LOWEST) -> float:
    """How many of the `count` tokens of lowest score are among the `count` least likely ones."""
    lowest = [set(np.argsort(values, kind="stable")[:count].tolist()) for values in (score, truth)]
    return float(len(lowest[0] & lowest[1]))


def mean_of(values) -> float | None:
    """Mean of the numbers that are no NaN; None without one."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def detection_measures(rows: list[JudgedRow], lowest: int = LOWEST) -> dict[str, dict[str, float | None]]:
    """What each score finds.

    Args:
        rows: of any states; all with the same scores.
        lowest: n of the overlap.
    Returns:
        {score: measures}. With labels of right and wrong: "within" (mean AUROC within a row that has both), "pooled"
        (AUROC over all tokens), "row" (AUROC of "no token is wrong" by the lowest score of a row), "ece". With
        probabilities: "overlap" (of the n lowest with the n least likely, rows of at least 2 n tokens), "rank" (mean
        rank correlation within a row), "ece" against the mean probability. None where nothing can be said.
    """
    found = {}
    for name in rows[0].scores if rows else ():
        scores = [row.scores[name] for row in rows]
        rights = [row.right for row in rows]
        if rows[0].right.dtype == bool:
            pooled, all_right = np.concatenate(scores), np.concatenate(rights)
            whole = auroc([score.min() for score in scores], [right.all() for right in rights])
            found[name] = {
                "within": mean_of([auroc(s, r) for s, r in zip(scores, rights, strict=True)]),
                "pooled": mean_of([auroc(pooled, all_right)]),
                "row": mean_of([whole]),
                "ece": float(calibration(np.clip(pooled, 0, 1), all_right)["ece"]),
            }
        else:
            enough = [(s, r) for s, r in zip(scores, rights, strict=True) if len(s) >= 2 * lowest]
            found[name] = {
                "overlap": mean_of([overlap(s, r, lowest) for s, r in enough]),
                "rank": mean_of([rank_correlation(s, r) for s, r in enough]),
                "ece": soft_ece(np.concatenate(scores), np.concatenate(rights)),
            }
    return found


def rank_correlation(one, other) -> float:
    """Spearman's; NaN where one has a single value."""
    ranks = []
    for values in (one, other):
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[group])
    if any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def soft_ece(score, probability, bins: int = 15) -> float:
    """Expected calibration error where the probability that a token is right is known."""
    score = np.clip(score, 0, 1)
    which = np.minimum((score * bins).astype(int), bins - 1)
    gaps = [
        abs(score[which == b].mean() - probability[which == b].mean()) * (which == b).mean() for b in np.unique(which)
    ]
    return float(sum(gaps))


def best_free(found: dict, measure: str) -> str | None:
    """The free score that is best by "within" or "overlap"; None if none can be told."""
    known = {name: found[name][measure] for name in FREE_SCORES if name in found and found[name][measure] is not None}
    return max(known, key=known.get) if known else None


def detection_table(found: dict) -> str:
    """What `detection_measures` gave as a Markdown table."""
    measures = list(next(iter(found.values())))
    lines = ["| score | " + " | ".join(TITLES[name] for name in measures) + " |"]
    lines.append("| --- |" + " --- |" * len(measures))
    for name, values in found.items():
        cells = ["-" if values[m] is None else f"{values[m]:.3f}" for m in measures]
        lines.append(f"| {NAMES.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
