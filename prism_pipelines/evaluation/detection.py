"""How well scores find the wrong tokens of a half-written canvas: within a row, over all rows, and wrong rows.

Three questions are different. Remasking ranks the tokens of one row, so AUROC within a row matters. Accepting a
finished row needs a score of rows. A threshold on the quality needs calibration.
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
        scores: scores by name; a higher score means more likely right.
        right: was each token right, bool; or the probability in [0, 1] that it is.
        fill: share of the generated tokens that are visible.
        age: forward passes since each token was drawn.
        kind: a label by which rows can be grouped, such as a number of clues.
    """

    scores: dict[str, np.ndarray]
    right: np.ndarray
    fill: float
    age: np.ndarray
    kind: str = ""


def overlap(score: ArrayLike, truth: ArrayLike, count: int = LOWEST) -> float:
    """How many of the `count` tokens of lowest score are among the `count` of lowest `truth`: 0 to `count`."""
    lowest = [set(np.argsort(values, kind="stable")[:count].tolist()) for values in (score, truth)]
    return float(len(lowest[0] & lowest[1]))


def mean_of(values: list[float | None]) -> float | None:
    """Mean of the values that are not None; None without one."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def detection_measures(rows: list[JudgedRow], lowest: int = LOWEST) -> dict[str, dict[str, float | None]]:
    """How well each score finds wrong tokens.

    Args:
        rows: judged rows of any states, all with the same scores.
        lowest: n of the overlap.
    Returns:
        {score: measures}. With labels of right and wrong: "within" (mean AUROC within a row that has both), "pooled"
        (AUROC over all tokens), "row" (AUROC of "no token is wrong" by the lowest score of a row), "ece". With
        probabilities: "overlap" (mean `overlap` with the true probabilities) and "rank" (mean rank correlation
        within a row), both over rows of at least 2 n tokens; "ece" against the mean probability. None where a measure
        is not defined.
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
    """The name of the free score with the highest value of a measure; None if no value is known."""
    known = {name: found[name][measure] for name in FREE_SCORES if name in found and found[name][measure] is not None}
    return max(known, key=lambda name: known[name]) if known else None


def detection_table(found: dict) -> str:
    """The result of `detection_measures` as a Markdown table."""
    measures = list(next(iter(found.values())))
    rows = [
        [NAMES.get(name, name), *("-" if values[m] is None else f"{values[m]:.3f}" for m in measures)]
        for name, values in found.items()
    ]
    return markdown_table(["score", *(TITLES[name] for name in measures)], rows)
