"""How well a quality head tells right tokens from wrong ones, and how well the backbone's own probability does.

Errors are planted as in the fine-tuning loss: mask a clean sequence, let the model fill a few of the masks with its own
draws, and score those. A token is right if it equals the clean one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..atomic_files import write_atomically
from .statistics import calibration_measures
from .tables import markdown_table

SCORES = {
    "head": "quality head",
    "visible": "backbone, token visible",
    "drawn": "backbone, when drawn",
    "exact": "exact posterior",
}


@dataclass(frozen=True)
class Planting:
    """How errors are planted: each token is masked, then some masks are filled with tokens that the model draws.

    With one filled mask per row, the ideal score is p(x_i = y_i | the other visible tokens), and the probability of the
    draw is an estimate of it. With more, the ideal score of a head is a mixture (see docs/method.md).

    Args:
        num_revealed: masks of a row that are filled, chosen uniformly; in a row with fewer masks, all of them.
        temperature: of the tokens that are drawn; 0 for the most likely ones.
        exact: for models small enough to enumerate, a callable from filled ids (B, L) and filled positions (B, L), N of
            them, to their true probabilities (N,) in row-major order; or None.
        generator: of masks and draws.
    """

    num_revealed: int
    temperature: float
    exact: Callable[[Tensor, Tensor], ArrayLike] | None
    generator: torch.Generator


def evaluate_calibration(
    pipe: Any,
    sequences: ArrayLike,
    *,
    mask_ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    num_revealed: int = 1,
    trainable_mask: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    temperature: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    bins: int = 15,
    resamples: int = 200,
    exact: Callable[[Tensor, Tensor], ArrayLike] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    out_dir: str | Path | None = None,
) -> dict:
    """AUROC, ECE, Brier score and reliability curve of P(token is right), by mask ratio and pooled.

    These scores are compared on the same tokens: "head" (if there is one); "visible" and "drawn", the backbone's
    probability of the token, at temperature 1, where the token is visible, and when it was drawn; "exact" if given.

    Args:
        pipe: a `PrismPipeline`, or anything with its `denoiser`, `quality_head` and `mask_token_id`.
        sequences: clean tokens, integers (N, L), N >= 1.
        mask_ratios: each in (0, 1].
        num_revealed, temperature, exact: see `Planting`.
        trainable_mask: true where a token may be masked, (N, L); None for all.
        attention_mask: 1 for tokens and 0 for padding, (N, L); None for no padding. Padding is never masked.
        draws: masked versions of each sequence and ratio.
        seed: of masks and draws.
        batch_size: sequences in a forward pass.
        bins: equal-width bins of the calibration error.
        resamples: bootstrap resamples of the sequences, for 95 % intervals; 0 for none.
        on_batch: called as `on_batch(done, total)` after each batch.
        out_dir: folder for calibration.json, .md and .png; None writes nothing.
    Returns:
        {"sequences", "num_revealed", "temperature", "draws", "seed", "pooled", "by_ratio"}. `pooled` and each entry of
        `by_ratio` hold for each score what `calibration_measures` gives, with "auroc_interval" and "brier_interval";
        with `exact` also "gap", the mean absolute difference from it. Entries of `by_ratio` also hold "mask_ratio".
    Raises:
        ValueError: no sequences, masks in clean tokens, a setting out of range, or a ratio at which no mask arose.
        ImportError: `out_dir` without matplotlib.
    """
    counts = {"num_revealed": num_revealed, "draws": draws, "batch_size": batch_size, "bins": bins}
    check_settings(counts, mask_ratios, temperature)
    clean = clean_batch(sequences, trainable_mask, attention_mask, pipe.mask_token_id)
    how = Planting(num_revealed, temperature, exact, torch.Generator().manual_seed(seed))
    found = planted_by_ratio(pipe, how, clean, mask_ratios, draws, batch_size, on_batch)
    pooled, *by_ratio = (_summary(tokens, bins, resamples, seed) for tokens in [_joined(found), *found])
    result: dict = {
        "sequences": len(clean[0]),
        "num_revealed": num_revealed,
        "temperature": temperature,
        "draws": draws,
    }
    result |= {"seed": seed, "pooled": pooled}
    result["by_ratio"] = [{"mask_ratio": float(t), **one} for t, one in zip(mask_ratios, by_ratio, strict=True)]
    if out_dir is not None:
        write_calibration(result, out_dir)
    return result


def check_settings(counts: dict[str, int], mask_ratios: Sequence[float], temperature: float) -> None:
    """Raise a ValueError for a setting of `evaluate_calibration` that is out of range."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if not len(mask_ratios) or not all(0 < ratio <= 1 for ratio in mask_ratios):
        raise ValueError(f"`mask_ratios` must lie in (0, 1], got {list(mask_ratios)}.")
    if temperature < 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}.")


def clean_batch(
    sequences: ArrayLike, trainable_mask: ArrayLike | None, attention_mask: ArrayLike | None, mask_token_id: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids int64, where a token may be masked, bool, and where there is no padding, bool or None; all (N, L).

    Raises:
        ValueError: another shape, or the mask token where a token may be masked.
    """
    ids = torch.as_tensor(np.asarray(sequences), dtype=torch.long)
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"`sequences` must have shape (N, L) with N, L >= 1, got {tuple(ids.shape)}.")
    padding = _as_mask("attention_mask", attention_mask, ids)
    allowed = _as_mask("trainable_mask", trainable_mask, ids) & padding
    if (allowed & (ids == mask_token_id)).any():
        raise ValueError(f"`sequences` holds the mask token ({mask_token_id}): no answer is known there.")
    return ids, allowed, None if attention_mask is None else padding


def planted_by_ratio(
    pipe: Any,
    how: Planting,
    clean: tuple[Tensor, Tensor, Tensor | None],
    mask_ratios: Sequence[float],
    draws: int,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None,
) -> list[dict]:
    """What `planted` gives for all sequences, `draws` times, at each mask ratio; arguments as `evaluate_calibration`.

    Raises:
        ValueError: no token was masked at a ratio.
    """
    ids, allowed, attention = clean
    starts, found = range(0, len(ids), batch_size), []
    total, done = len(mask_ratios) * draws * len(starts), 0
    for ratio in mask_ratios:
        parts = []
        for start in [start for _ in range(draws) for start in starts]:
            rows = slice(start, start + batch_size)
            shown = None if attention is None else attention[rows]
            tokens = planted(pipe, how, ratio, ids[rows], allowed[rows], shown)
            parts.append(tokens | {"sequence": tokens["sequence"] + start})
            done += 1
            if on_batch is not None:
                on_batch(done, total)
        found.append(_joined(parts))
        if not len(found[-1]["right"]):
            raise ValueError(
                f"No token was masked at ratio {ratio} in {len(ids)} sequences; pass more or a larger one."
            )
    return found


def write_calibration(result: dict, out_dir: str | Path) -> None:
    """Write what `evaluate_calibration` found to calibration.json, calibration.md and calibration.png in a folder."""
    from .plots import reliability_comparison_figure

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "calibration.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "calibration.md", calibration_table(result))
    panels = {"all mask ratios": result["pooled"]}
    panels |= {f"mask ratio {entry['mask_ratio']:g}": entry for entry in result["by_ratio"]}
    curves = {
        title: {SCORES[name]: entry[name]["reliability"] for name in SCORES if name in entry}
        for title, entry in panels.items()
    }
    reliability_comparison_figure(curves, folder / "calibration.png")


def calibration_table(result: dict) -> str:
    """Markdown table of what `evaluate_calibration` found, with its settings below."""
    rows = []
    for entry in [*result["by_ratio"], {"mask_ratio": "all", **result["pooled"]}]:
        for name, title in SCORES.items():
            if name in entry:
                found = entry[name]
                auroc = "-" if found["auroc"] is None else f"{found['auroc']:.3f}"
                auroc, brier = auroc + _bracket(found["auroc_interval"]), f"{found['brier']:.4f}"
                row = [entry["mask_ratio"], title, found["n"], f"{100 * found['wrong']:.1f}", auroc]
                rows.append([*row, f"{found['ece']:.4f}", brier + _bracket(found["brier_interval"])])
    header = ["mask ratio", "score", "tokens", "wrong (%)", "AUROC", "ECE", "Brier"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{result['sequences']} sequences, {result['draws']} masked version(s) each, {result['num_revealed']} token(s) "
        f"revealed a row, temperature {result['temperature']:g}, seed {result['seed']}. In brackets: 95 % intervals, "
        "bootstrap over sequences.\n"
    )


@torch.no_grad()
def planted(
    pipe: Any, how: Planting, ratio: float, clean: Tensor, allowed: Tensor, attention: Tensor | None
) -> dict[str, np.ndarray]:
    """Scores of the M tokens that were planted in one batch, with "right" and the number of their "sequence", (M,).

    Args:
        pipe: as `evaluate_calibration`.
        how: see `Planting`.
        ratio: probability with which a token is masked.
        clean: right tokens, int64 (B, L).
        allowed: where a token may be masked, bool (B, L).
        attention: where there is no padding, bool (B, L), or None.
    """
    masked = allowed & (torch.rand(clean.shape, generator=how.generator) < ratio)  # (B, L)
    # The k smallest of uniform numbers are k positions drawn without replacement.
    key = torch.rand(clean.shape, generator=how.generator).masked_fill(~masked, 2.0)
    revealed = masked & (key.argsort(-1).argsort(-1) < how.num_revealed)
    row = revealed.nonzero()[:, 0].numpy()
    if not revealed.any():
        return {"right": np.zeros(0, dtype=bool), "sequence": row}
    denoiser, head = pipe.denoiser, pipe.quality_head
    device = next((part.device for part in (getattr(pipe, "model", None),) if part is not None), clean.device)
    attention = None if attention is None else attention.long().to(device)
    z = clean.masked_fill(masked, pipe.mask_token_id).to(device)
    logits = denoiser.logits(denoiser.hidden(z, attention), revealed.to(device)).float().cpu()  # (M, V)
    own = logits.softmax(-1)
    if how.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = torch.multinomial((logits / how.temperature).softmax(-1), 1, generator=how.generator)[:, 0]
    y = z.masked_scatter(revealed.to(device), tokens.to(device))
    hidden = denoiser.hidden(y, attention)
    seen = denoiser.logits(hidden, revealed.to(device)).float().cpu().softmax(-1)
    found = {"visible": seen.gather(1, tokens[:, None])[:, 0], "drawn": own.gather(1, tokens[:, None])[:, 0]}
    if head is not None:
        found["head"] = head(hidden, attention).float().sigmoid().cpu()[revealed]
    if how.exact is not None:
        found["exact"] = torch.as_tensor(how.exact(y.cpu(), revealed))
    scores = {name: score.double().numpy().clip(0, 1) for name, score in found.items()}
    return {**scores, "right": (tokens == clean[revealed]).numpy(), "sequence": row}


def _joined(parts: list[dict]) -> dict:
    """Arrays of the parts one after the other; parts without tokens have no scores."""
    filled = [part for part in parts if len(part["right"])]
    if not filled:
        return parts[0]
    return {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}


def _summary(tokens: dict, bins: int, resamples: int, seed: int) -> dict:
    """`calibration_measures` of every score, with intervals by a bootstrap over sequences."""
    right = tokens["right"]
    found: dict[str, dict] = {}
    _, sequence = np.unique(tokens["sequence"], return_inverse=True)
    order = np.argsort(sequence, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(sequence))[:-1])
    rng = np.random.default_rng(seed)
    picks = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(resamples)]
    for name in SCORES:
        if name in tokens:
            score = tokens[name]
            found[name] = calibration_measures(score, right, bins=bins)
            again = [calibration_measures(score[pick], right[pick], bins=1) for pick in picks]
            for measure in ("auroc", "brier"):
                values = [one[measure] for one in again if one[measure] is not None]
                interval = np.quantile(values, [0.025, 0.975]).tolist() if len(groups) > 1 and values else None
                found[name][f"{measure}_interval"] = interval
            if "exact" in tokens:
                found[name]["gap"] = float(np.abs(score - tokens["exact"]).mean())
    return found


def _as_mask(name: str, mask: ArrayLike | None, ids: Tensor) -> Tensor:
    """A mask as bool (N, L), true everywhere if it is None."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    found = torch.as_tensor(np.asarray(mask)).bool()
    if found.shape != ids.shape:
        raise ValueError(f"`{name}` must have the shape of `sequences`, {tuple(ids.shape)}, got {tuple(found.shape)}.")
    return found


def _bracket(interval: list[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"


def fit_temperature(quality: ArrayLike, right: ArrayLike) -> float:
    """The temperature that calibrates a quality head: what its logits are divided by before the sigmoid.

    T minimises the cross-entropy of sigmoid(logit(quality) / T) and `right`, which has one minimum in 1 / T. Fit T on
    canvases like those that will be judged: finished ones, from runs with the scheduler in use, on data that the head
    was not trained on. Store it with `head.register_to_config(temperature=T)`, then save the head. A head without a
    temperature counts as not calibrated: `out.confidence` is None, and `select="confidence"` is refused.

    Args:
        quality: the head's quality of each token at temperature 1 (None in its config), probabilities (N,).
        right: was the token right? bool (N,); or the probability that it was, float in [0, 1] (N,).
    Returns:
        T, above 0. Below 1 the head was not sure enough, above 1 it was too sure.
    Raises:
        ValueError: other shapes, a quality outside [0, 1], or tokens that are all right or all wrong.
    Source: temperature scaling, Guo et al. (arXiv 1706.04599).
    """
    quality, right = np.asarray(quality, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if quality.ndim != 1 or quality.shape != right.shape:
        raise ValueError(f"`quality` and `right` must have one shape (N,), got {quality.shape} and {right.shape}.")
    for name, values in (("quality", quality), ("right", right)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"`{name}` must lie in [0, 1]; apply the sigmoid first.")
    if (right == 1).all() or not right.any():
        raise ValueError(f"`right` must hold right and wrong tokens, got {int(right.sum())} right of {len(right)}.")
    p = quality.clip(1e-6, 1 - 1e-6)
    logits = np.log(p / (1 - p))

    def slope(scale: float) -> float:  # of the mean cross-entropy, which is convex in scale = 1 / T
        return float((logits * (1 / (1 + np.exp(np.clip(-scale * logits, -700, 700))) - right)).mean())

    low, high = np.log(0.02), np.log(50.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> dict:
    """The share of wrong answers among the n surest ones, for every n: what is gained by rejecting the others.

    Args:
        confidence: confidence of each answer, or any score that is higher for surer answers, (N,).
        right: was the answer right? bool (N,).
    Returns:
        {"coverage", "risk", "area"}. Entry n - 1 of the first two, lists of N numbers, is n / N and the share of wrong
        answers among the n surest; ties stay in the given order. "area" is the mean risk.
    Raises:
        ValueError: no answers, or other shapes.
    Source: El-Yaniv and Wiener, JMLR 11 (2010).
    """
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    if confidence.ndim != 1 or confidence.shape != right.shape or not confidence.size:
        raise ValueError(f"Both must have one shape (N,), N >= 1, got {confidence.shape} and {right.shape}.")
    order, n = np.argsort(-confidence, kind="stable"), np.arange(1, len(right) + 1)
    risk = (~right[order]).cumsum() / n
    return {"coverage": (n / len(right)).tolist(), "risk": risk.tolist(), "area": float(risk.mean())}
