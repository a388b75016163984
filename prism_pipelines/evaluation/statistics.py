"""Intervals of means and shares, the table of a comparison, and its Pareto front."""

from __future__ import annotations

import math

import numpy as np

from .sudoku import wilson_interval


def bootstrap_interval(values, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of a mean, by resampling the values; None for fewer than two.

    With few values it is far too narrow (of 2 it misses the mean half of the time): use `t_interval` for these.

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
    rng, n = np.random.default_rng(seed), len(values)
    times = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # (R, N)
    low, high = np.quantile(times @ values / n, [0.025, 0.975])
    return float(low), float(high)


# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; beyond, the series below is right to 0.00002.
T_QUANTILES = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t with `df` >= 1 degrees of freedom.

    Source: M. Abramowitz and I. Stegun, Handbook of Mathematical Functions, 26.7.5, for df of 10 and more.
    """
    if df <= len(T_QUANTILES):
        return T_QUANTILES[df - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**k for k, term in enumerate(terms, start=1))


def t_interval(values) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t, for a few independent numbers such as one a seed; None for one.

    Args:
        values: independent numbers, shape (N,), about normal.
    Returns:
        (low, high), or None.
    Source: Student, Biometrika 6 (1908).
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    reach = t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def tabulate(cells: dict, arms, forwards, seeds, reference: str) -> tuple[list[dict], list[dict]]:
    """Rows of the table, and differences from the reference arm paired by seed (and by item, where there are any).

    A list of bools gets Wilson's interval over all items and seeds; it treats the seeds of an item as independent. A
    list of numbers is averaged over seeds and bootstrapped over items, as are all differences of lists. A single number
    gets a t interval over seeds, and so do differences of these.

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
                place = {"arm": arm, "forwards": steps, "metric": metric, "value": float(np.mean(means[arm]))}
                if isinstance(found[0], list) and all(isinstance(item, bool) for run in found for item in run):
                    trials = sum(map(len, found))
                    interval, kind = wilson_interval(sum(map(sum, found)), trials), "wilson"
                else:
                    trials, (interval, kind) = len(means[arm]), _interval(means[arm], found)
                low, high = interval or (None, None)
                rows.append({**place, "low": low, "high": high, "n": trials, "interval": kind})
                if arm != reference:
                    difference = means[arm] - means[reference]
                    low, high = _interval(difference, found)[0] or (None, None)
                    pairs.append(
                        {
                            "arm": arm,
                            "reference": reference,
                            "forwards": steps,
                            "metric": metric,
                            "difference": float(difference.mean()),
                            "low": low,
                            "high": high,
                            "n": len(difference),
                        }
                    )
    return rows, pairs


def _interval(values, found: list) -> tuple:
    """Interval of the mean of `_independent` values or their differences, and its kind."""
    if isinstance(found[0], list):
        return bootstrap_interval(values), "bootstrap"
    return t_interval(values), "t"


def _independent(found: list) -> np.ndarray:
    """Independent values: means over seeds of each item (N,), or one number a seed (S,)."""
    array = np.asarray(found, dtype=np.float64)
    return array.mean(axis=0) if array.ndim == 2 else array


def pareto_front(points, higher_is_better: bool = True) -> list[tuple]:
    """The (forwards, value) points that no other beats: none is better with as few forwards, or as good with fewer.

    Returns:
        the front, ascending in forwards; equal points once.
    """
    sign, front, best = (1 if higher_is_better else -1), [], -math.inf
    for steps, value in sorted(set(points), key=lambda point: (point[0], -sign * point[1])):
        if sign * value > best:
            front.append((steps, value))
            best = sign * value
    return front
