"""The n-gram judge against its formula in plain Python, and against what a probability must be."""

import math
import types
from collections import Counter

import numpy as np
import pytest

from prism_pipelines.evaluation.ngram_judge import ngram_judge

D = 0.75
TEXTS = ["a b a c b", "b a b a a c", "c c"]


class Letters:
    """A tokenizer of the words a, b, c, d."""

    def __len__(self):
        return 4

    def __call__(self, text, add_special_tokens=False):
        return types.SimpleNamespace(input_ids=["abcd".index(letter) for letter in text.split()])


def brute(u, v, w):
    """p(w | u v), counted anew from the sentences; u None for p(w | v)."""
    words = [text.split() for text in TEXTS]
    triples = Counter(t for row in words for t in zip(row, row[1:], row[2:], strict=False))
    kinds_of_pair = Counter(t[1:] for t in triples)
    kinds_of_single = Counter(pair[1] for pair in kinds_of_pair)
    p = max(kinds_of_single[w] - D, 0) / sum(kinds_of_single.values())
    p += D * len(kinds_of_single) / sum(kinds_of_single.values()) / 4
    after = {pair: n for pair, n in kinds_of_pair.items() if pair[0] == v}
    if after:
        p = (max(kinds_of_pair[v, w] - D, 0) + D * len(after) * p) / sum(after.values())
    after = {t: n for t, n in triples.items() if t[:2] == (u, v)}
    if u is not None and after:
        p = (max(triples[u, v, w] - D, 0) + D * len(after) * p) / sum(after.values())
    return p


def test_every_probability_agrees_with_the_formula_in_plain_python():
    judge = ngram_judge(TEXTS, Letters())
    for u in "abcd":
        for v in "abcd":
            for w in "abcd":
                (loss,) = judge([f"{u} {v} {w}"])
                expected = [-math.log(brute(None, u, v)), -math.log(brute(u, v, w))]
                np.testing.assert_allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_probabilities_of_all_next_tokens_sum_to_one(n):
    judge = ngram_judge(TEXTS, Letters(), n=n)
    for history in ("a", "a b", "b a", "d d", "c d", "d a", "b a b a"):  # seen, never seen, and seen in part
        total = sum(math.exp(-judge([f"{history} {w}"])[0][-1]) for w in "abcd")
        assert total == pytest.approx(1, abs=1e-12)


def test_a_longer_history_is_used_where_the_text_has_it():
    """After "b a" comes b, a or the end; after "a b a" only c, once."""
    short, long = (ngram_judge(TEXTS, Letters(), n=n)(["a b a c"])[0][-1] for n in (3, 4))
    c_after_aba = (1 - D) + D * math.exp(-short)  # close to p(c | b a), by kinds instead of counts
    assert math.exp(-long) == pytest.approx(c_after_aba, abs=0.1) and long < short


def test_a_text_of_too_few_tokens_and_lengths_without_sense_are_refused():
    with pytest.raises(ValueError, match="at least 3 tokens"):
        ngram_judge(["a b", "c"], Letters())
    for n in (1, 32):
        with pytest.raises(ValueError, match="`n` must be at least 2, and 4 tokens to the power"):
            ngram_judge(TEXTS, Letters(), n=n)
