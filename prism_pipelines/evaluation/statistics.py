"""Statistics: intervals of means and shares, ranks, calibration, the table of a comparison and its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a binomial share, as (low, high); 95 % for the default z.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z·sd it has a width at 0 and n successes.

    Raises:
        ValueError: n < 1, or successes outside 0..n.
    Source: E. B. Wilson, JASA 22 (1927).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"`successes` must be within 0..n and n >= 1, got {successes} of {n}.")
    p, spread = successes / n, z * z / n
    centre = p + spread / 2
    half = math.sqrt(spread * (p * (1 - p) + spread / 4))
    # Rounding can leave 1e-17 where the bound is exactly 0 or 1.
    low = 0.0 if successes == 0 else (centre - half) / (1 + spread)
    high = 1.0 if successes == n else (centre + half) / (1 + spread)
    return low, high


def resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap resamples of n items, int64 (resamples, n): how often each item was drawn."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def bootstrap_interval(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of a mean, by resampling the values; None for fewer than two.

    With few values the interval is far too narrow (with 2, it misses the mean half of the time): use `t_interval`.

    Args:
        values: independent numbers, shape (N,).
        resamples: bootstrap resamples.
        seed: of the bootstrap.
    Returns:
        (low, high), or None.
    Source: B. Efron, Annals of Statistics 7 (1979).
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    low, high = np.quantile(resampled(len(values), resamples, seed) @ values / len(values), [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t, for a few independent numbers, such as one per seed; None for one number.

    Args:
        values: independent numbers, shape (N,), about normal.
    Returns:
        (low, high), or None.
    Raises:
        ImportError: scipy is not installed.
    Source: Student, Biometrika 6 (1908).
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError('Student\'s t needs scipy: pip install "prism-pipelines[eval]".') from error
    reach = float(stdtrit(len(values) - 1, 0.975)) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def paired_failure_ratio(failed: ArrayLike, failed_other: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> dict:
    """Failures of one method over failures of another on the same puzzles and seeds, with a bootstrap interval.

    Puzzles are resampled, each with all its seeds: runs of one puzzle are not independent of each other.

    Args:
        failed, failed_other: bool of shape (S, N), S seeds by N puzzles; both from the same seeds and puzzles.
        resamples: bootstrap resamples of the N puzzles.
        seed: of the bootstrap.
    Returns:
        {"failures", "failures_other", "ratio", "low", "high"}; 95 % percentile interval. A number is None where it is
        not defined, because the other method never failed. If the first method never failed, every resample is 0; then
        `high` is 3 / failures_other (the rule of three).
    Raises:
        ValueError: the two shapes differ or are not (S, N).
    """
    failed, failed_other = np.asarray(failed, dtype=bool), np.asarray(failed_other, dtype=bool)
    if failed.ndim != 2 or failed.shape != failed_other.shape or not failed.size:
        raise ValueError(f"Both must have one shape (S, N), got {failed.shape} and {failed_other.shape}.")
    ours, theirs = failed.sum(axis=0), failed_other.sum(axis=0)  # (N,): failures of each puzzle over its seeds
    result: dict = {"failures": int(ours.sum()), "failures_other": int(theirs.sum())}
    if not theirs.any():
        return {**result, "ratio": None, "low": None, "high": None}
    result["ratio"] = float(ours.sum() / theirs.sum())
    if not ours.any():
        return {**result, "low": 0.0, "high": float(3 / theirs.sum())}
    times = resampled(len(ours), resamples, seed)  # how often each puzzle was drawn
    below = times @ theirs
    # A resample without a failure of the other method has no finite ratio; it belongs at the upper end.
    ratios = np.where(below > 0, times @ ours / np.maximum(below, 1), np.inf)
    low, high = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    return {**result, "low": float(low), "high": float(high) if np.isfinite(high) else None}


def mean_ranks(values: ArrayLike) -> np.ndarray:
    """Rank of each value, from 1 on, float64 (N,); equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def auroc(score: ArrayLike, right: ArrayLike) -> float | None:
    """Chance that a right item scores higher than a wrong one; ties count half. None if all are right or all wrong.

    Args:
        score: numbers, shape (N,).
        right: bools, shape (N,).
    Source: H. Mann and D. Whitney, Annals of Mathematical Statistics 18 (1947).
    """
    right = np.asarray(right, dtype=bool)
    n, n_right = len(right), int(right.sum())
    if not 0 < n_right < n:
        return None
    above = mean_ranks(score)[right].sum() - n_right * (n_right + 1) / 2
    return float(above / (n_right * (n - n_right)))


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float | None:
    """Spearman's rank correlation of numbers, shape (N,) each; None if one of the two is constant."""
    ranks = [mean_ranks(values) for values in (one, other)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def calibration_measures(quality: ArrayLike, right: ArrayLike, *, bins: int = 15) -> dict:
    """How well P(token is right) tells right from wrong, and whether it is calibrated.

    Args:
        quality: claimed probabilities of being right, floats in [0, 1] of shape (N,).
        right: whether each token was right, bool of shape (N,).
        bins: equal-width bins of the calibration error.
    Returns:
        {"n", "wrong" (share), "auroc", "ece", "brier", "reliability"}. `auroc` is P(quality of a wrong token < quality
        of a right one), ties counted half, None where all are right or all wrong. `ece` is the mean over tokens of
        |mean quality - share right| of their bin. `reliability` lists (mean quality, share right, n) of filled bins.
    Raises:
        ValueError: shapes differ, nothing given, or a quality outside [0, 1].
    """
    quality, right = np.asarray(quality, dtype=np.float64), np.asarray(right, dtype=bool)
    if quality.ndim != 1 or quality.shape != right.shape or not quality.size:
        raise ValueError(f"Both must have one shape (N,), N >= 1, got {quality.shape} and {right.shape}.")
    if not ((quality >= 0) & (quality <= 1)).all():
        raise ValueError("`quality` must lie in [0, 1]; apply the sigmoid first.")
    points, n = reliability(quality, right, bins), len(right)
    return {
        "n": n,
        "wrong": 1 - int(right.sum()) / n,
        "auroc": auroc(quality, right),
        "ece": expected_calibration_error(points),
        "brier": float(((quality - right) ** 2).mean()),
        "reliability": points,
    }


def reliability(claimed: ArrayLike, found: ArrayLike, bins: int = 15) -> list[tuple[float, float, int]]:
    """For each bin of equal width that is not empty: mean claimed probability, mean of `found`, and their number.

    Args:
        claimed: probabilities in [0, 1], shape (N,).
        found: bools or probabilities, shape (N,).
        bins: how many bins [0, 1] is cut into.
    """
    claimed, found = np.asarray(claimed, dtype=np.float64), np.asarray(found)
    which = np.minimum((claimed * bins).astype(int), bins - 1)
    filled = [which == b for b in range(bins) if (which == b).any()]
    return [(float(claimed[b].mean()), float(found[b].mean()), int(b.sum())) for b in filled]


def expected_calibration_error(points: list[tuple[float, float, int]]) -> float:
    """Mean over all N items of |mean claimed - mean found| of their bin, from the result of `reliability`."""
    return sum(size * abs(claimed - found) for claimed, found, size in points) / sum(size for _, _, size in points)


def tabulate(
    cells: dict, arms: Sequence[str], forwards: Sequence[int], seeds: Sequence[int], reference: str
) -> tuple[list[dict], list[dict]]:
    """Rows of the table, and differences from the reference arm paired by seed (and by item, where there are any).

    A list of bools gets Wilson's interval over all items and seeds, which treats the seeds of an item as independent. A
    list of numbers is averaged over seeds and bootstrapped over items; differences of lists are too. A single number
    gets a t interval over seeds; differences of single numbers do too.

    Args:
        cells: {(arm, forwards, seed): {metric: number or list}}, complete.
        arms, forwards, seeds: what to tabulate.
        reference: arm that the others are compared with.
    Returns:
        rows: {"arm", "forwards", "metric", "value", "low", "high", "n", "interval"}, the last "wilson", "bootstrap"
        or "t";
        pairs: {"arm", "reference", "forwards", "metric", "difference" (arm - reference), "low", "high", "n"}.
        `n` counts the seeds of a t interval, the items of a bootstrap, or the trials of Wilson's interval; low and high
        are None where n is 1 (but Wilson's).
    """
    rows, pairs = [], []
    metrics = list(cells[arms[0], forwards[0], seeds[0]])
    for steps in forwards:
        for metric in metrics:
            values = {arm: [cells[arm, steps, seed][metric] for seed in seeds] for arm in arms}
            means = {arm: _independent(found) for arm, found in values.items()}
            for arm, found in values.items():
                trials, (interval, kind) = len(means[arm]), _interval(means[arm], found)
                if isinstance(found[0], list) and all(isinstance(item, bool) for run in found for item in run):
                    trials = sum(map(len, found))
                    interval, kind = wilson_interval(sum(map(sum, found)), trials), "wilson"
                row: dict = {"arm": arm, "forwards": steps, "metric": metric, "value": float(np.mean(means[arm]))}
                rows.append(row | _bounds(interval) | {"n": trials, "interval": kind})
                if arm != reference:
                    difference = means[arm] - means[reference]
                    pair: dict = {"arm": arm, "reference": reference, "forwards": steps, "metric": metric}
                    pair |= {"difference": float(difference.mean()), **_bounds(_interval(difference, found)[0])}
                    pairs.append(pair | {"n": len(difference)})
    return rows, pairs


def _bounds(interval: tuple[float, float] | None) -> dict[str, float | None]:
    """The two ends of an interval by name."""
    low, high = interval or (None, None)
    return {"low": low, "high": high}


def _interval(values: np.ndarray, found: list) -> tuple:
    """Interval of the mean of `_independent` values or their differences, and its kind."""
    if isinstance(found[0], list):
        return bootstrap_interval(values), "bootstrap"
    return t_interval(values), "t"


def _independent(found: list) -> np.ndarray:
    """Independent values: means over seeds of each item (N,), or one number a seed (S,)."""
    array = np.asarray(found, dtype=np.float64)
    return array.mean(axis=0) if array.ndim == 2 else array


def pareto_front(points: Iterable[tuple], higher_is_better: bool = True) -> list[tuple]:
    """The (forwards, value) points that no other point beats: better with as few forwards, or as good with fewer.

    Returns:
        the front, ascending in forwards; equal points once.
    """
    sign, front, best = (1 if higher_is_better else -1), [], -math.inf
    for steps, value in sorted(set(points), key=lambda point: (point[0], -sign * point[1])):
        if sign * value > best:
            front.append((steps, value))
            best = sign * value
    return front
