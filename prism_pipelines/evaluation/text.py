"""How close generated text is to held-out text, how varied it is, and how likely a judge model finds it.

No single number stands for quality: perplexity under a judge falls when text repeats itself, so entropy, distinct-n and
self-BLEU always come with it, and MAUVE comes with its number of samples and its spread over seeds. n-gram distances
and the share of known words need no download.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from ..schedulers.token_sampling import seeded_generators
from .statistics import resampled

SPECIAL_TOKENS = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>", "[PAD]", "<pad>", "[CLS]", "[SEP]", "<|endoftext|>")
LOWER_IS_BETTER = ("ngram_js", "word_js", "self_bleu", "degenerate", "nll")  # of `text_measures`
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


# --- samples ----------------------------------------------------------------------------------------------------------


def check_texts(texts, name: str = "texts", special_tokens=SPECIAL_TOKENS) -> list[str]:
    """The texts as a list, if every one can be scored.

    Raises:
        TypeError: not a list of strings.
        ValueError: none given, an empty one, or one that holds a mask or another special token.
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


def read_texts(path) -> list[str]:
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
    texts = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
    if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(f'{path}: entry {wrong[0]} is neither a string nor {{"text": string}}.')
    return texts


def pipeline_texts(pipe, num_samples: int, gen_length: int, num_inference_steps: int, seed: int, batch_size: int = 16):
    """Unconditional samples of a pipeline with the scheduler it has; sample i depends on the seed and i alone.

    Args:
        pipe: a `PrismPipeline` with a tokenizer.
        num_samples: texts to generate.
        gen_length: tokens of each.
        num_inference_steps: as the pipeline's.
        seed: not negative.
        batch_size: samples a forward.
    Returns:
        list of `num_samples` texts.
    Raises:
        ValueError: no tokenizer, no samples wanted, or masks left in a generation.
    """
    if getattr(pipe, "tokenizer", None) is None:
        raise ValueError("`pipe` has no tokenizer, so its samples are no text. Load it with tokenizer=.")
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


def ngrams(sequence, n: int) -> list[tuple]:
    """The n-grams of a sequence, in order; len(sequence) - n + 1 of them.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def ngram_distance(texts, reference, *, n: int = 3, unit: str = "character") -> float:
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


def known_word_share(texts, vocabulary) -> float:
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


def unigram_entropy(sequences) -> float:
    """Entropy of the tokens of a sequence by their own frequencies, in nats, mean over sequences.

    Args:
        sequences: lists of tokens (ids, words or characters), each not empty.
    Raises:
        ValueError: no sequences or an empty one.
    Source: the entropy reported beside generative perplexity, "Masked Diffusion Models are Secretly Time-Agnostic
        Masked Models" (arXiv 2409.02908).
    """
    sequences = list(sequences)
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("`sequences` must hold at least one sequence, and none that is empty.")

    def entropy(sequence):
        return -sum(c / len(sequence) * math.log(c / len(sequence)) for c in Counter(sequence).values())

    return sum(map(entropy, sequences)) / len(sequences)


def distinct_n(sequences, n: int) -> float:
    """Different n-grams over all n-grams, pooled over sequences; 1 if none comes twice. Falls with more samples.

    Raises:
        ValueError: no n-grams.
    Source: J. Li et al., "A Diversity-Promoting Objective Function" (arXiv 1510.03055).
    """
    found = [gram for sequence in sequences for gram in ngrams(sequence, n)]
    if not found:
        raise ValueError(f"`sequences` has no {n}-grams.")
    return len(set(found)) / len(found)


def self_bleu(sequences, max_n: int = 4) -> float | None:
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
        highest = defaultdict(lambda: [0, 0])  # n-gram -> its two largest counts, so that a sequence can be left out
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


def diversity(texts, *, unit: str = "word") -> dict:
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


# --- measures by another model ----------------------------------------------------------------------------------------


def load_judge(name: str, *, device: str = "cpu", revision: str | None = None, max_length: int | None = None):
    """A causal language model as a judge for `generative_perplexity`.

    A text longer than the model's context is scored in windows: the last token of one is the first of the next, so
    every token but the first of the text is scored once.

    Args:
        name: folder or Hub id.
        device: where it runs.
        revision: branch, tag or commit.
        max_length: tokens of a window, >= 2; None for the model's own context, or 1024 if it names none.
    Returns:
        callable from a list of texts to a list of arrays: the negative log-likelihood of each token, in nats.
    Raises:
        ValueError: there is no such model, or it looks at later tokens.
    """
    model, tokenizer = _load(name, "AutoModelForCausalLM", "judge", device, revision)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[0, 0], [0, 1]], device=device)).logits[:, 0].float()
    if not torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"The judge {name!r} is not causal: its prediction of a token sees that token, so its likelihoods are none."
        )
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    window = min(max_length or context, context)
    if window < 2:
        raise ValueError(f"`max_length` must be at least 2, got {max_length}.")

    @torch.no_grad()
    def judge(texts):
        losses = []
        for text in texts:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
            parts = []
            for start in range(0, len(ids) - 1, window - 1):
                part = ids[None, start : start + window].to(device)
                logits = model(input_ids=part).logits[0, :-1].float()
                parts.append(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none").cpu())
            losses.append(torch.cat(parts).numpy() if parts else np.zeros(0))
        return losses

    judge.__name__ = name  # results name the judge by it
    return judge


def generative_perplexity(
    texts, judge, *, unit: str = "word", resamples: int = 2000, seed: int = 0, device: str = "cpu"
):
    """Perplexity of texts under a judge, with the diversity that it must be read beside.

    exp of the mean negative log-likelihood over all scored tokens of all texts.

    Args:
        texts: list of strings.
        judge: name for `load_judge`, or a callable from texts to arrays of negative log-likelihoods in nats.
        unit: of the diversity, "word" or "character".
        resamples: bootstrap resamples of the texts, for the 95 % interval.
        seed: of the bootstrap.
        device: of a judge given by name. For a revision or a window of your own pass `load_judge(...)` itself.
    Returns:
        {"judge", "perplexity", "low", "high", "tokens", "n", "diversity"}; low and high None for a single text.
    Raises:
        ValueError: what `check_texts` and `load_judge` raise, or a text of fewer than two of the judge's tokens.
    """
    texts = check_texts(texts)
    name = judge if isinstance(judge, str) else getattr(judge, "__name__", type(judge).__name__)
    judge = load_judge(judge, device=device) if isinstance(judge, str) else judge
    losses = [np.asarray(loss, dtype=np.float64) for loss in judge(texts)]
    if len(losses) != len(texts):
        raise ValueError(f"`judge` must give one array per text: {len(texts)} expected, got {len(losses)}.")
    for i, loss in enumerate(losses):
        if not loss.size or not np.isfinite(loss).all():
            raise ValueError(f"`judge` gives {loss.size} tokens or a number that is not finite for `texts`[{i}].")
    sums, sizes = np.array([loss.sum() for loss in losses]), np.array([loss.size for loss in losses])
    low = high = None
    if len(texts) > 1:
        times = resampled(len(texts), resamples, seed)
        low, high = np.exp(np.quantile((times @ sums) / (times @ sizes), [0.025, 0.975])).tolist()
    perplexity = float(np.exp(sums.sum() / sizes.sum()))
    found = {"judge": name, "perplexity": perplexity, "low": low, "high": high, "tokens": int(sizes.sum())}
    return {**found, "n": len(texts), "diversity": diversity(texts, unit=unit)}


def load_featurizer(name: str, *, device: str = "cpu", revision: str | None = None, max_length: int = 512):
    """A language model as a featuriser for `mauve_score`: the last hidden state of a text's last token.

    Args:
        name, device, revision: as `load_judge`.
        max_length: tokens of a text that are read.
    Returns:
        callable from a list of texts to float32 features (n, H).
    Raises:
        ValueError: there is no such model.
    """
    model, tokenizer = _load(name, "AutoModel", "featurizer", device, revision)

    @torch.no_grad()
    def featurize(texts):
        rows = []
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"].to(device)
            rows.append(model(input_ids=ids).last_hidden_state[0, -1].float().cpu().numpy())
        return np.stack(rows)

    featurize.__name__ = name  # results name the featuriser by it
    return featurize


def check_mauve(num_texts: int, num_reference: int, num_clusters: int | None = None) -> int:
    """The number of clusters for `mauve_score` with so many texts.

    Raises:
        ValueError, ImportError: `mauve_score` would refuse.
    """
    smaller = min(num_texts, num_reference)
    num_clusters = max(2, round(smaller / 10)) if num_clusters is None else num_clusters
    if num_clusters < 2 or smaller < num_clusters:
        raise ValueError(
            f"MAUVE needs at least as many samples as clusters, and 2 clusters: got {num_texts} texts, "
            f"{num_reference} reference texts and num_clusters={num_clusters}."
        )
    try:
        import mauve  # noqa: F401
    except ImportError as error:
        raise ImportError('MAUVE needs mauve-text (GPL): pip install "prism-pipelines[text]"') from error
    return num_clusters


def mauve_score(
    texts, reference, featurizer, *, seeds=(0, 1, 2, 3, 4), num_clusters: int | None = None, device: str = "cpu"
) -> dict:
    """MAUVE of generated against held-out text, over several seeds of its clustering.

    It moves with the number of samples, the featuriser and the seed: compare scores of equal n and featuriser only.

    Args:
        texts, reference: lists of strings; best equally many, and thousands.
        featurizer: name for `load_featurizer`, or a callable from texts to features (n, H).
        seeds: of k-means; the spread over them is reported.
        num_clusters: None for a tenth of the smaller side, at least 2, as in mauve-text.
        device: of a featuriser given by name.
    Returns:
        {"mauve" (mean), "min", "max", "per_seed", "seeds", "n", "n_reference", "num_clusters", "featurizer"}.
    Raises:
        ImportError: mauve-text is not installed. It is GPL, so it is an extra.
        ValueError: fewer samples than clusters, no seeds, or features of a wrong shape.
    Source: K. Pillutla et al., MAUVE (arXiv 2102.01454); computed by mauve-text.
    """
    texts, reference = check_texts(texts), check_texts(reference, "reference")
    num_clusters = check_mauve(len(texts), len(reference), num_clusters)
    if not len(seeds):
        raise ValueError("`seeds` is empty: pass at least one.")
    from mauve import compute_mauve

    name = featurizer if isinstance(featurizer, str) else getattr(featurizer, "__name__", type(featurizer).__name__)
    featurizer = load_featurizer(featurizer, device=device) if isinstance(featurizer, str) else featurizer
    p, q = np.asarray(featurizer(texts)), np.asarray(featurizer(reference))
    if p.ndim != 2 or q.ndim != 2 or (len(p), len(q)) != (len(texts), len(reference)) or p.shape[1] != q.shape[1]:
        raise ValueError(f"`featurizer` must give (n, H) features for n texts, got {p.shape} and {q.shape}.")
    found = [
        float(compute_mauve(p_features=p, q_features=q, num_buckets=num_clusters, seed=seed, verbose=False).mauve)
        for seed in seeds
    ]
    return {
        "mauve": sum(found) / len(found),
        "min": min(found),
        "max": max(found),
        "per_seed": found,
        "seeds": list(seeds),
        "n": len(texts),
        "n_reference": len(reference),
        "num_clusters": num_clusters,
        "featurizer": name,
    }


def _load(name: str, kind: str, role: str, device: str, revision: str | None):
    """Model and tokenizer of a folder or Hub id; `kind` is the name of a transformers Auto class."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        model = getattr(transformers, kind).from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {role} {name!r} could not be loaded ({str(error).splitlines()[0]}). Pass the folder or Hub id of a "
            f"transformers model and check the network; distances by n-grams need no model."
        ) from error
    return model.eval().to(device), tokenizer


# --- all of them ------------------------------------------------------------------------------------------------------


def evaluate_text(
    texts,
    reference,
    *,
    vocabulary=None,
    judge=None,
    featurizer=None,
    seeds=(0, 1, 2, 3, 4),
    num_clusters: int | None = None,
    unit: str = "word",
    special_tokens=SPECIAL_TOKENS,
    device: str = "cpu",
) -> dict:
    """Every measure that the arguments allow, of one set of generated texts.

    Args:
        texts: generated texts.
        reference: held-out texts, that no model was trained on.
        vocabulary: known words, lower-case; None for those of `reference`, which then misses rare ones.
        judge: as `generative_perplexity`; None for none.
        featurizer: as `mauve_score`; None for none.
        seeds, num_clusters: of MAUVE.
        unit: of the diversity, "word" or "character".
        special_tokens: strings that finished text must not hold; those of your tokenizer.
        device: of judge and featuriser, if they are given by name.
    Returns:
        {"n", "n_reference", "characters", "ngram_js" {"character_3", "word_1", "word_2"}, "known_words",
        "diversity", "reference_diversity", "perplexity", "mauve"}; the last two None if not asked for.
    Raises:
        ValueError, TypeError, ImportError: what the single measures raise.
    """
    texts = check_texts(texts, "texts", special_tokens)
    reference = check_texts(reference, "reference", special_tokens)
    settings = [("character", 3), ("word", 1), ("word", 2)]
    distances = {f"{kind}_{n}": ngram_distance(texts, reference, n=n, unit=kind) for kind, n in settings}
    known = {word for text in reference for word in words(text)} if vocabulary is None else vocabulary
    perplexity = mauve = None
    if judge is not None:
        perplexity = generative_perplexity(texts, judge, unit=unit, device=device)
    if featurizer is not None:
        mauve = mauve_score(texts, reference, featurizer, seeds=seeds, num_clusters=num_clusters, device=device)
    return {
        "n": len(texts),
        "n_reference": len(reference),
        "characters": sum(map(len, texts)),
        "ngram_js": distances,
        "known_words": known_word_share(texts, known),
        "diversity": diversity(texts, unit=unit),
        "reference_diversity": diversity(reference, unit=unit),
        "perplexity": perplexity,
        "mauve": mauve,
    }


def text_measures(texts, reference, vocabulary, *, judge=None, unit: str = "word") -> dict:
    """The measures without download of one set of texts, as `run_comparison` wants them.

    A text without a word, or an empty one, is counted as degenerate and does not stop the others from being scored: it
    is left out of the pooled measures, its entropy is 0, and its nll, if the judge finds no token, the others' mean. A
    measure that is left without anything to count has its worst value.

    Args:
        texts, reference, vocabulary, unit: as `evaluate_text`.
        judge: callable from texts to arrays of negative log-likelihoods, such as `ngram_judge`; None for none.
    Returns:
        numbers {"ngram_js" (characters, n = 4), "word_js" (n = 1), "known_words", "distinct_2", "self_bleu" (0 for one
        text), "degenerate" (share)} and lists with a value for each text {"entropy", and "nll", nats per token, with a
        judge}.
    Raises:
        ValueError, TypeError: what `check_texts` raises but for an empty text; a judge that finds no token in any text.
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


def _mean_losses(losses) -> list[float]:
    """Mean of each text's losses; of one without any, the mean of the others."""
    means = [float(np.mean(loss)) if len(loss) else None for loss in losses]
    known = [mean for mean in means if mean is not None]
    if not known:
        raise ValueError(f"`judge` finds no token to score in any of the {len(means)} texts.")
    return [sum(known) / len(known) if mean is None else mean for mean in means]


def text_task(reference, *, num_samples: int, gen_length: int, vocabulary=None, judge=None, unit="word", batch_size=16):
    """Writing from nothing as a task of `run_comparison`: generate `num_samples` texts and score them.

    Args:
        reference, vocabulary, judge, unit: as `text_measures`; a vocabulary of None is that of `reference`.
        num_samples, gen_length, batch_size: as `pipeline_texts`.
    Returns:
        callable from (pipe, steps, seed) to what `text_measures` gives; its attribute `lower_is_better` names metrics.
    """
    reference = check_texts(reference, "reference")
    known = {word for text in reference for word in words(text)} if vocabulary is None else set(vocabulary)

    def task(pipe, steps, seed):
        texts = pipeline_texts(pipe, num_samples, gen_length, steps, seed, batch_size)
        return text_measures(texts, reference, known, judge=judge, unit=unit)

    task.lower_is_better = LOWER_IS_BETTER
    return task
