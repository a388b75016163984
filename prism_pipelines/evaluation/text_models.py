"""Measures of text by another model: perplexity under a judge, and MAUVE by a featuriser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .statistics import resampled
from .text import SPECIAL_TOKENS, Judge, check_texts, diversity, known_word_share, ngram_distance, words

Featurizer = Callable[[list[str]], np.ndarray]  # texts -> features (n, H)


def load_judge(name: str, *, device: str = "cpu", revision: str | None = None, max_length: int | None = None) -> Judge:
    """A causal language model as a judge for `generative_perplexity`.

    A text longer than the model's context is scored in windows. The last token of a window is the first of the next
    one, so every token but the first of the text is scored once.

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
    def judge(texts: list[str]) -> list[np.ndarray]:
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
    texts: Iterable[str],
    judge: str | Judge,
    *,
    unit: str = "word",
    resamples: int = 2000,
    seed: int = 0,
    device: str = "cpu",
) -> dict:
    """Perplexity of texts under a judge, with the diversity of the texts: repetition alone makes perplexity low.

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


def load_featurizer(
    name: str, *, device: str = "cpu", revision: str | None = None, max_length: int = 512
) -> Featurizer:
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
    def featurize(texts: list[str]) -> np.ndarray:
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
    texts: Iterable[str],
    reference: Iterable[str],
    featurizer: str | Featurizer,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    num_clusters: int | None = None,
    device: str = "cpu",
) -> dict:
    """MAUVE of generated against held-out text, over several seeds of its clustering.

    MAUVE depends on the number of samples, the featuriser and the seed: compare only scores of equal n and featuriser.

    Args:
        texts, reference: lists of strings, best the same number of texts in both, and thousands.
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


def _load(name: str, kind: str, role: str, device: str, revision: str | None) -> tuple[Any, Any]:
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


def evaluate_text(
    texts: Iterable[str],
    reference: Iterable[str],
    *,
    vocabulary: Iterable[str] | None = None,
    judge: str | Judge | None = None,
    featurizer: str | Featurizer | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    num_clusters: int | None = None,
    unit: str = "word",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
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
