"""A judge of text that needs no download: a trigram model with Kneser-Ney smoothing, counted from a training text."""

from __future__ import annotations

import numpy as np

DISCOUNT = 0.75


def ngram_judge(texts, tokenizer):
    """A trigram model of the tokens of some texts, as a judge for `generative_perplexity`.

    Interpolated Kneser-Ney with one discount d = 0.75. With c the counts, N1+(. v w) the number of different tokens
    before (v, w), and the same with dots elsewhere:

        p(w | u v) = (max(c(u v w) - d, 0) + d N1+(u v .) p(w | v)) / c(u v .)
        p(w | v)   = (max(N1+(. v w) - d, 0) + d |{w: N1+(. v w) > 0}| p(w)) / sum_w N1+(. v w)
        p(w)       = (max(N1+(. w) - d, 0) + d |{w: N1+(. w) > 0}| / V) / sum_w N1+(. w)

    and a history that never occurred leaves it to the shorter one. It sees three tokens at a time: it tells whether
    neighbours fit, not whether a sentence makes sense.

    Args:
        texts: list of strings to count in; those the generator was trained on, not those it is compared with.
        tokenizer: transformers tokenizer; V is its length.
    Returns:
        callable from a list of texts to a list of float64 arrays, the negative log-likelihoods in nats of all tokens
        but the first; the second is scored by the token before it alone.
    Raises:
        ValueError: `texts` has fewer than three tokens in a row anywhere.
    Source: S. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), sec. 2.7.
    """
    size = len(tokenizer)
    rows = [np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64) for text in texts]
    triples = np.concatenate([(row[:-2] * size + row[1:-1]) * size + row[2:] for row in rows if len(row) > 2] or [[]])
    if not len(triples):
        raise ValueError("`texts` must hold a text of at least three tokens.")
    triples, count = np.unique(triples.astype(np.int64), return_counts=True)
    pairs, before_pair = np.unique(triples % size**2, return_counts=True)  # N1+(. v w)
    single, before_single = np.unique(pairs % size, return_counts=True)  # N1+(. w)
    of_pair, of_single = _Totals(triples // size, count), _Totals(pairs // size, before_pair)
    unigram = np.full(size, DISCOUNT * len(single) / size)
    unigram[single] += before_single - DISCOUNT
    unigram /= before_single.sum()

    def interpolate(keys, counts, wanted, histories, history, shorter):
        total, kinds = histories.of(history)
        seen = np.maximum(_lookup(keys, counts, wanted) - DISCOUNT, 0)
        return np.where(total > 0, (seen + DISCOUNT * kinds * shorter) / np.maximum(total, 1), shorter)

    def judge(texts):
        losses = []
        for text in texts:
            ids = np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
            pair = ids[:-1] * size + ids[1:]
            p = interpolate(pairs, before_pair, pair, of_single, ids[:-1], unigram[ids[1:]])
            if len(ids) > 2:
                triple = pair[:-1] * size + ids[2:]
                p[1:] = interpolate(triples, count, triple, of_pair, pair[:-1], p[1:])
            losses.append(-np.log(p))
        return losses

    judge.__name__ = "trigram"
    return judge


class _Totals:
    """Of each history, the sum of the counts after it and how many different tokens follow it."""

    def __init__(self, histories, counts):
        self.keys, start = np.unique(histories, return_index=True)  # histories ascend
        self.totals = np.add.reduceat(counts, start)
        self.kinds = np.diff([*start, len(histories)])

    def of(self, history):
        return _lookup(self.keys, self.totals, history), _lookup(self.keys, self.kinds, history)


def _lookup(keys, values, wanted):
    """`values` where ascending `keys` equal `wanted`, 0 where there is no such key."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
