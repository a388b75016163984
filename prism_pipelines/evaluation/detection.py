"""How well scores find the wrong tokens of a half-written canvas: within a row, over all, and of the row as a whole.

Remasking ranks the tokens of one row, so that is what counts for it; whether a finished row may be accepted is another
question; and a bar on the quality is a third, which calibration answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .statistics import auroc, expected_calibration_error, rank_correlation, reliability
from .tables import markdown_table

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


def overlap(score: ArrayLike, truth: ArrayLike, count: int = LOWEST) -> float:
    """How many of the `count` tokens of lowest score are among the `count` least likely ones."""
    lowest = [set(np.argsort(values, kind="stable")[:count].tolist()) for values in (score, truth)]
    return float(len(lowest[0] & lowest[1]))


def mean_of(values: list[float | None]) -> float | None:
    """Mean of the values that are not None; None without one."""
    known = [value for value in values if value is not None]
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
                "pooled": auroc(pooled, all_right),
                "row": whole,
                "ece": expected_calibration_error(reliability(np.clip(pooled, 0, 1), all_right)),
            }
        else:
            enough = [(s, r) for s, r in zip(scores, rights, strict=True) if len(s) >= 2 * lowest]
            found[name] = {
                "overlap": mean_of([overlap(s, r, lowest) for s, r in enough]),
                "rank": mean_of([rank_correlation(s, r) for s, r in enough]),
                "ece": expected_calibration_error(
                    reliability(np.concatenate(scores).clip(0, 1), np.concatenate(rights))
                ),
            }
    return found


def best_free(found: dict, measure: str) -> str | None:
    """The free score that is best by "within" or "overlap"; None if none can be told."""
    known = {name: found[name][measure] for name in FREE_SCORES if name in found and found[name][measure] is not None}
    return max(known, key=lambda name: known[name]) if known else None


def detection_table(found: dict) -> str:
    """What `detection_measures` gave as a Markdown table."""
    measures = list(next(iter(found.values())))
    rows = [
        [NAMES.get(name, name), *("-" if values[m] is None else f"{values[m]:.3f}" for m in measures)]
        for name, values in found.items()
    ]
    return markdown_table(["score", *(TITLES[name] for name in measures)], rows)
