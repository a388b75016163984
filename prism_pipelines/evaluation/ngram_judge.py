"""A judge of text that needs no download: an n-gram model with Kneser-Ney smoothing, counted from a training text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

DISCOUNT = 0.75


def ngram_judge(texts: Iterable[str], tokenizer: Any, *, n: int = 3) -> Callable[[Iterable[str]], list[np.ndarray]]:
    """An n-gram model of the tokens of some texts, as a judge for `generative_perplexity`.

    Interpolated Kneser-Ney with one discount d = 0.75. For a history h of m tokens and a token w, N(h w) is the number
    of times that h w occurs if m = n - 1, and for smaller m the number of different tokens before h w. Then

        p(w | h) = (max(N(h w) - d, 0) + d |{v: N(h v) > 0}| p(w | h')) / sum_v N(h v)

    where h' is h without its first token, and for the empty history p(w | h') is 1 / V. For a history that never
    occurred, p(w | h) = p(w | h'). The judge sees n tokens at a time: it measures whether neighbours fit, not whether a
    sentence makes sense.

    Args:
        texts: list of strings to count n-grams in: training texts of the generator, not the texts of a comparison.
        tokenizer: transformers tokenizer; V is its length.
        n: length of the n-grams, at least 2; V^n must stay below 2^63. Of whole words 3 is usual, of characters 6.
    Returns:
        callable from a list of texts to a list of float64 arrays, the negative log-likelihoods in nats of all tokens
        but the first, each given the n - 1 tokens before it (fewer at the beginning).
    Raises:
        ValueError: no text has n tokens, or `n` is out of range.
    Source: S. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), sec. 2.7.
    """
    size = len(tokenizer)
    if n < 2 or size**n >= 2**63:
        raise ValueError(f"`n` must be at least 2, and {size} tokens to the power of it below 2^63; got {n}.")

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)

    found = [_windows(row, n, size) for row in map(encode, texts) if len(row) >= n]
    if not found:
        raise ValueError(f"`texts` must hold a text of at least {n} tokens.")
    grams, counts = np.unique(np.concatenate(found), return_counts=True)
    tables = {n: (grams, counts, _Totals(grams // size, counts))}
    for m in range(n - 1, 0, -1):
        grams, counts = np.unique(grams % size**m, return_counts=True)  # after how many different tokens
        tables[m] = (grams, counts, _Totals(grams // size, counts))

    def judge(texts: Iterable[str]) -> list[np.ndarray]:
        losses = []
        for text in texts:
            ids = encode(text)
            p = np.full(len(ids), 1 / size)  # of each token, by ever longer histories
            for m in range(1, min(n, len(ids)) + 1):
                grams, counts, histories = tables[m]
                wanted = _windows(ids, m, size)
                total, kinds = histories.of(wanted // size)
                shorter, seen = p[m - 1 :], np.maximum(_lookup(grams, counts, wanted) - DISCOUNT, 0)
                p[m - 1 :] = np.where(total > 0, (seen + DISCOUNT * kinds * shorter) / np.maximum(total, 1), shorter)
            losses.append(-np.log(p[1:]))
        return losses

    judge.__name__ = f"{n}-gram"
    return judge


def _windows(ids: np.ndarray, m: int, size: int) -> np.ndarray:
    """Each m tokens in a row as one number, int64 (len(ids) - m + 1,): the last counts 1, the first size^(m-1)."""
    number = np.zeros(len(ids) - m + 1, dtype=np.int64)
    for i in range(m):
        number = number * size + ids[i : len(ids) - m + 1 + i]
    return number


class _Totals:
    """Of each history, the sum of the counts after it and how many different tokens follow it."""

    def __init__(self, histories: np.ndarray, counts: np.ndarray) -> None:
        self.keys, start = np.unique(histories, return_index=True)  # histories ascend
        self.totals = np.add.reduceat(counts, start)
        self.kinds = np.diff([*start, len(histories)])

    def of(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _lookup(self.keys, self.totals, history), _lookup(self.keys, self.kinds, history)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` where ascending `keys` equal `wanted`, 0 where there is no such key."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
