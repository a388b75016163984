"""How close generated text is to held-out text, how varied it is, and how likely a judge model finds it.

No single number measures quality. Perplexity under a judge falls when text repeats itself, so entropy, distinct-n and
self-BLEU are always given with it. MAUVE is given with its number of samples and its spread over seeds. n-gram
distances and the share of known words need no download.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..schedulers.token_sampling import seeded_generators

SPECIAL_TOKENS = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>", "[PAD]", "<pad>", "[CLS]", "[SEP]", "<|endoftext|>")
LOWER_IS_BETTER = ("ngram_js", "word_js", "self_bleu", "degenerate", "nll")  # of `text_measures`
Judge = Callable[[list[str]], Sequence[np.ndarray]]  # texts -> negative log-likelihoods of their tokens, in nats
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


# --- samples ----------------------------------------------------------------------------------------------------------


def check_texts(texts: Iterable[str], name: str = "texts", special_tokens: Sequence[str] = SPECIAL_TOKENS) -> list[str]:
    """The texts as a list, if every text can be scored.

    Raises:
        TypeError: not a list of strings.
        ValueError: no texts, an empty text, or a text with a mask or another special token in it.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError(f"`{name}` is empty: pass at least one text.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must hold strings, got {type(text).__name__} at {i}.")
        if not text.strip():
            raise ValueError(f"`{name}`[{i}] is empty. An empty generation counts: handle it before scoring the rest.")
        if held := [token for token in special_tokens if token in text]:
            raise ValueError(
                f"`{name}`[{i}] holds the special token {held[0]!r}: the generation is not finished text. Decode with "
                "skip_special_tokens=True if that token may stand there, or pass `special_tokens` of your tokenizer."
            )
    return texts


def read_texts(path: str | Path) -> list[str]:
    """Texts of a file: .jsonl (a string or {"text": ...} a line), .json (a list of these) or .txt (one text).

    Raises:
        ValueError: another ending, or an entry without text.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} must end in .jsonl, .json or .txt, got {path.suffix!r}.")
    content = path.read_text(encoding="utf-8")
    try:
        lines = [line for line in content.split("\n") if line.strip()]  # splitlines() cuts at a raw U+2028 inside one
        entries = json.loads(content) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of texts, got {type(entries).__name__}.")
    texts: list[Any] = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
    if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(f'{path}: entry {wrong[0]} is neither a string nor {{"text": string}}.')
    return texts


def pipeline_texts(
    pipe: Any, num_samples: int, gen_length: int, num_inference_steps: int, seed: int, batch_size: int = 16
) -> list[str]:
    """Unconditional samples of a pipeline with its present scheduler; sample i depends on the seed and i alone.

    Args:
        pipe: a `PrismPipeline` with a tokenizer.
        num_samples: texts to generate.
        gen_length: tokens of each text.
        num_inference_steps: as in the pipeline's call.
        seed: at least 0.
        batch_size: samples in a forward pass.
    Returns:
        list of `num_samples` texts.
    Raises:
        ValueError: no tokenizer, `num_samples` below 1, or a mask that is left in a text.
    """
    if getattr(pipe, "tokenizer", None) is None:
        raise ValueError("`pipe` has no tokenizer, so its samples are not text. Load it with tokenizer=.")
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"`num_samples` and `batch_size` must be at least 1, got {num_samples} and {batch_size}.")
    texts = []
    for start in range(0, num_samples, batch_size):
        rows = range(start, min(start + batch_size, num_samples))
        generators = seeded_generators(seed, rows)
        out = pipe(
            num_samples=len(rows),
            gen_length=gen_length,
            num_inference_steps=num_inference_steps,
            generator=generators,
        )
        # Decoding drops special tokens, so masks must be looked for among the ids.
        if left := int((out.sequences == pipe.mask_token_id).sum()):
            raise ValueError(
                f"{left} masks are left in samples {rows.start} to {rows.stop - 1}: generation is cut off."
            )
        texts += out.texts
    return texts


# --- measures that need no download -----------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words of a text: runs of letters, with apostrophes inside."""
    return WORD.findall(text.lower())


def units(text: str, unit: str) -> list[str]:
    """The text as a list of "character"s or "word"s.

    Raises:
        ValueError: another unit.
    """
    if unit not in ("character", "word"):
        raise ValueError(f'`unit` must be "character" or "word", got {unit!r}.')
    return list(text) if unit == "character" else words(text)


def ngrams(sequence: Sequence, n: int) -> list[tuple]:
    """The n-grams of a sequence, in order; len(sequence) - n + 1 of them.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def ngram_distance(texts: Iterable[str], reference: Iterable[str], *, n: int = 3, unit: str = "character") -> float:
    """Jensen-Shannon distance of the pooled n-gram distributions of two sets of texts.

    sqrt((KL(P || M) + KL(Q || M)) / 2) with M = (P + Q) / 2 and logarithms to base 2: 0 for equal distributions, 1 for
    those that share no n-gram. It grows as samples get fewer, so compare at equal amounts of text only.

    Args:
        texts, reference: lists of strings.
        n: length of the n-grams; they do not cross from one text to the next.
        unit: "character" or "word".
    Raises:
        ValueError: no n-grams on a side, or an unknown unit.
    Source: J. Lin, IEEE Trans. Inf. Theory 37 (1991); D. Endres and J. Schindelin, ibid. 49 (2003), for the root.
    """
    p, q = (Counter(g for text in side for g in ngrams(units(text, unit), n)) for side in (texts, reference))
    for name, counts in (("texts", p), ("reference", q)):
        if not counts:
            raise ValueError(f"`{name}` has no {unit} {n}-grams; pass longer texts or a smaller `n`.")
    total_p, total_q, divergence = p.total(), q.total(), 0.0
    for gram in p.keys() | q.keys():
        a, b = p[gram] / total_p, q[gram] / total_q
        for share in (a, b):
            divergence += share * math.log2(2 * share / (a + b)) / 2 if share else 0.0
    return math.sqrt(min(max(divergence, 0.0), 1.0))


def known_word_share(texts: Iterable[str], vocabulary: Iterable[str]) -> float:
    """Share of the words of the texts, with repetition, that are in the vocabulary.

    Args:
        texts: list of strings.
        vocabulary: lower-case words, for instance those of the training text by `words`.
    Raises:
        ValueError: an empty vocabulary, or no word in the texts.
    """
    vocabulary = set(vocabulary)
    found = [word for text in texts for word in words(text)]
    if not vocabulary or not found:
        raise ValueError(f"`vocabulary` has {len(vocabulary)} words and `texts` {len(found)}; both need at least one.")
    return sum(word in vocabulary for word in found) / len(found)


def unigram_entropy(sequences: Iterable[Sequence]) -> float:
    """Entropy of the tokens of a sequence by their own frequencies, in nats, mean over sequences.

    Args:
        sequences: lists of tokens (ids, words or characters), each not empty.
    Raises:
        ValueError: no sequences or an empty one.
    Source: the entropy reported with generative perplexity, "Masked Diffusion Models are Secretly Time-Agnostic
        Masked Models" (arXiv 2409.02908).
    """
    sequences = list(sequences)
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("`sequences` must hold at least one sequence, and none that is empty.")

    def entropy(sequence: Sequence) -> float:
        return -sum(c / len(sequence) * math.log(c / len(sequence)) for c in Counter(sequence).values())

    return sum(map(entropy, sequences)) / len(sequences)


def distinct_n(sequences: Iterable[Sequence], n: int) -> float:
    """Number of different n-grams divided by that of all n-grams, over all sequences; 1 if no n-gram repeats.

    It falls as samples are added, so compare at equal amounts of text.

    Raises:
        ValueError: no n-grams.
    Source: J. Li et al., "A Diversity-Promoting Objective Function" (arXiv 1510.03055).
    """
    found = [gram for sequence in sequences for gram in ngrams(sequence, n)]
    if not found:
        raise ValueError(f"`sequences` has no {n}-grams.")
    return len(set(found)) / len(found)


def self_bleu(sequences: Iterable[Sequence], max_n: int = 4) -> float | None:
    """Mean BLEU of each sequence with all others as references, in [0, 1]; high means samples repeat each other.

    Clipped precisions of n = 1..max_n with equal weights; an n without a match counts 0.1 matches (smoothing method 1
    of Chen and Cherry, 2014), an n longer than the sequence is left out; brevity penalty by the closest length.

    Returns:
        the mean, or None for fewer than two sequences.
    Raises:
        ValueError: an empty sequence.
    Source: Y. Zhu et al., "Texygen" (arXiv 1802.01886).
    """
    sequences = [list(sequence) for sequence in sequences]
    if not all(sequences):
        raise ValueError("`sequences` must not hold an empty sequence.")
    if len(sequences) < 2:
        return None
    logs: list[list[float]] = [[] for _ in sequences]
    for n in range(1, max_n + 1):
        counts = [Counter(ngrams(sequence, n)) for sequence in sequences]
        highest: dict[tuple, list[int]] = defaultdict(
            lambda: [0, 0]
        )  # n-gram -> its two largest counts, so that a sequence can be left out
        for own in counts:
            for gram, count in own.items():
                highest[gram] = sorted([*highest[gram], count], reverse=True)[:2]
        for i, own in enumerate(counts):
            if own:
                clipped = sum(min(c, highest[g][highest[g][0] == c]) for g, c in own.items())
                logs[i].append(math.log(max(clipped, 0.1) / own.total()))
    lengths, scores = [len(sequence) for sequence in sequences], []
    for i, length in enumerate(lengths):
        closest = min((abs(other - length), other) for j, other in enumerate(lengths) if j != i)[1]
        penalty = 1.0 if length >= closest else math.exp(1 - closest / length)
        scores.append(penalty * math.exp(sum(logs[i]) / len(logs[i])))
    return sum(scores) / len(scores)


def diversity(texts: Iterable[str], *, unit: str = "word") -> dict:
    """Entropy, distinct-1 to 3 and self-BLEU of texts, by words or characters.

    Returns:
        {"unit", "n", "entropy" (nats), "distinct_1", "distinct_2", "distinct_3", "self_bleu"}; None where the texts
        are too short or too few.
    Raises:
        ValueError: a text without a single unit.
    """
    sequences = [units(text, unit) for text in texts]
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise ValueError(f'`texts`[{i}] has no {unit}; use unit="character".')
    longest = max(map(len, sequences))
    distinct = {f"distinct_{n}": distinct_n(sequences, n) if n <= longest else None for n in (1, 2, 3)}
    entropy, bleu = unigram_entropy(sequences), self_bleu(sequences)
    return {"unit": unit, "n": len(sequences), "entropy": entropy, **distinct, "self_bleu": bleu}


# --- for comparisons --------------------------------------------------------------------------------------------------


def text_measures(
    texts: Iterable[str],
    reference: Iterable[str],
    vocabulary: Iterable[str],
    *,
    judge: Judge | None = None,
    unit: str = "word",
) -> dict:
    """The measures without download of one set of texts, as `run_comparison` wants them.

    An empty text, or one without a word, is counted as degenerate; the others are still scored. It is left out of the
    pooled measures, and its entropy is 0. If the judge finds no token in a text, its nll is the mean of the others. A
    measure for which no text is left has its worst value.

    Args:
        texts, reference, vocabulary, unit: as `evaluate_text`.
        judge: callable from texts to arrays of negative log-likelihoods, such as `ngram_judge`; None for none.
    Returns:
        dict of numbers "ngram_js" (characters, n = 4), "word_js" (n = 1), "known_words", "distinct_2", "self_bleu" (0
        for one text) and "degenerate" (share), and of lists with a value for each text: "entropy", and with a judge
        "nll", nats per token.
    Raises:
        ValueError, TypeError: as `check_texts`, except that empty texts are legal; or the judge finds no token at all.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    spoken = [text for text in texts if not isinstance(text, str) or words(text)]
    if spoken or not texts:
        check_texts(spoken)
    sequences = [units(text, unit) for text in spoken]
    found = {
        "ngram_js": ngram_distance(spoken, reference, n=4) if max(map(len, spoken), default=0) >= 4 else 1.0,
        "word_js": ngram_distance(spoken, reference, n=1, unit="word") if spoken else 1.0,
        "known_words": known_word_share(spoken, vocabulary) if spoken else 0.0,
        "entropy": [unigram_entropy([units(text, unit)]) if words(text) else 0.0 for text in texts],
        "distinct_2": distinct_n(sequences, 2) if max(map(len, sequences), default=0) >= 2 else 0.0,
        "self_bleu": self_bleu(sequences) or 0.0 if spoken else 1.0,
        "degenerate": 1 - len(spoken) / len(texts),
    }
    return found if judge is None else found | {"nll": _mean_losses(judge(texts))}


def _mean_losses(losses: Sequence[np.ndarray]) -> list[float]:
    """Mean of each text's losses; of one without any, the mean of the others."""
    means = [float(np.mean(loss)) if len(loss) else None for loss in losses]
    known = [mean for mean in means if mean is not None]
    if not known:
        raise ValueError(f"`judge` finds no token to score in any of the {len(means)} texts.")
    return [sum(known) / len(known) if mean is None else mean for mean in means]


def text_task(
    reference: Iterable[str],
    *,
    num_samples: int,
    gen_length: int,
    vocabulary: Iterable[str] | None = None,
    judge: Judge | None = None,
    unit: str = "word",
    batch_size: int = 16,
) -> Any:
    """Writing from nothing as a task of `run_comparison`: generate `num_samples` texts and score them.

    Args:
        reference, vocabulary, judge, unit: as `text_measures`; a vocabulary of None is that of `reference`.
        num_samples, gen_length, batch_size: as `pipeline_texts`.
    Returns:
        callable from (pipe, steps, seed) to what `text_measures` gives; its attribute `lower_is_better` names metrics.
    """
    reference = check_texts(reference, "reference")
    known = {word for text in reference for word in words(text)} if vocabulary is None else set(vocabulary)

    def task(pipe: Any, steps: int, seed: int) -> dict:
        texts = pipeline_texts(pipe, num_samples, gen_length, steps, seed, batch_size)
        return text_measures(texts, reference, known, judge=judge, unit=unit)

    vars(task)["lower_is_better"] = LOWER_IS_BETTER
    return task
