"""How well a quality head tells right tokens from wrong ones, beside what the backbone itself says, by mask ratio.

Errors are planted as in the fine-tuning loss: mask a clean sequence, let the model fill a few of the masks with its own
draws, and score those. A token is right if it equals the clean one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ..atomic_files import write_atomically
from .statistics import calibration_measures

SCORES = {
    "head": "quality head",
    "visible": "backbone, token visible",
    "drawn": "backbone, when drawn",
    "exact": "exact posterior",
}


def evaluate_calibration(
    pipe,
    sequences,
    *,
    mask_ratios=(0.1, 0.3, 0.5, 0.7, 0.9),
    num_revealed: int = 1,
    trainable_mask=None,
    attention_mask=None,
    temperature: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    bins: int = 15,
    resamples: int = 200,
    exact=None,
    on_batch=None,
    out_dir=None,
) -> dict:
    """AUROC, ECE, Brier score and reliability curve of P(token is right), by mask ratio and pooled.

    For each ratio t: mask each token with probability t, draw tokens at `num_revealed` masks chosen uniformly, and
    score these in a second forward. A row with fewer masks reveals all of them; one with none adds nothing. With
    `num_revealed` = 1 the ideal score is p(x_i = y_i | the other visible tokens), and the draw's own probability
    estimates just that; with more, the ideal of the head is a mixture (see docs/method.md).

    Scores compared on the same tokens:
        head: the quality head on the filled sequence; left out if the pipeline has none.
        visible: the backbone's probability of the token on the filled sequence, where it sees that token.
        drawn: the backbone's probability of the token when it was drawn, at temperature 1.
        exact: what `exact` gives; left out without it.

    Args:
        pipe: a `PrismPipeline`, or anything with its `denoiser`, `quality_head` and `mask_token_id`.
        sequences: clean tokens, integers (N, L), N >= 1.
        mask_ratios: each in (0, 1].
        num_revealed: k >= 1.
        trainable_mask: true where a token may be masked, (N, L); None for all.
        attention_mask: 1 for tokens and 0 for padding, (N, L); None for no padding. Padding is never masked.
        temperature: of the planted tokens; 0 for the most likely ones.
        draws: masked versions of each sequence and ratio.
        seed: of masks and draws.
        batch_size: sequences a forward.
        bins: equal-width bins of the calibration error.
        resamples: bootstrap resamples of the sequences, for 95 % intervals; 0 for none.
        exact: callable from filled ids (B, L) and revealed positions (B, L), N of them, to the true probabilities (N,)
            in row-major order. For worlds small enough to enumerate.
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
    ids = torch.as_tensor(np.asarray(sequences), dtype=torch.long)
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"`sequences` must have shape (N, L) with N, L >= 1, got {tuple(ids.shape)}.")
    counts = {"num_revealed": num_revealed, "draws": draws, "batch_size": batch_size, "bins": bins}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if not len(mask_ratios) or not all(0 < ratio <= 1 for ratio in mask_ratios):
        raise ValueError(f"`mask_ratios` must lie in (0, 1], got {list(mask_ratios)}.")
    if temperature < 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}.")
    padding = _as_mask("attention_mask", attention_mask, ids)
    allowed = _as_mask("trainable_mask", trainable_mask, ids) & padding
    if (allowed & (ids == pipe.mask_token_id)).any():
        raise ValueError(f"`sequences` holds the mask token ({pipe.mask_token_id}): no answer is known there.")

    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(ids) // batch_size)
    total, by_ratio, everything = len(mask_ratios) * draws * batches, [], []
    for ratio in mask_ratios:
        parts = []
        for _ in range(draws):
            for start in range(0, len(ids), batch_size):
                rows = slice(start, start + batch_size)
                attention = None if attention_mask is None else padding[rows]
                tokens = _planted(
                    pipe, ids[rows], allowed[rows], attention, ratio, num_revealed, temperature, generator, exact
                )
                tokens["sequence"] += start
                parts.append(tokens)
                if on_batch is not None:
                    done = len(by_ratio) * draws * batches + len(parts)
                    on_batch(done, total)
        pooled = _joined(parts)
        if not len(pooled["right"]):
            raise ValueError(
                f"No token was masked at ratio {ratio} in {len(ids)} sequences; pass more or a larger one."
            )
        everything.append(pooled)
        by_ratio.append({"mask_ratio": float(ratio), **_summary(pooled, bins, resamples, seed)})
    result = {
        "sequences": len(ids),
        "num_revealed": num_revealed,
        "temperature": temperature,
        "draws": draws,
        "seed": seed,
        "pooled": _summary(_joined(everything), bins, resamples, seed),
        "by_ratio": by_ratio,
    }
    if out_dir is not None:
        write_calibration(result, out_dir)
    return result


def write_calibration(result: dict, out_dir) -> None:
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
    lines = [
        "| mask ratio | score | tokens | wrong (%) | AUROC | ECE | Brier |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in [*result["by_ratio"], {"mask_ratio": "all", **result["pooled"]}]:
        for name, title in SCORES.items():
            if name in entry:
                found = entry[name]
                auroc = "-" if found["auroc"] is None else f"{found['auroc']:.3f}"
                auroc, brier = auroc + _bracket(found["auroc_interval"]), f"{found['brier']:.4f}"
                lines.append(
                    f"| {entry['mask_ratio']} | {title} | {found['n']} | {100 * found['wrong']:.1f} | {auroc} | "
                    f"{found['ece']:.4f} | {brier}{_bracket(found['brier_interval'])} |"
                )
    lines += [
        "",
        f"{result['sequences']} sequences, {result['draws']} masked version(s) each, {result['num_revealed']} token(s) "
        f"revealed a row, temperature {result['temperature']:g}, seed {result['seed']}. In brackets: 95 % intervals, "
        "bootstrap over sequences.",
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def _planted(pipe, clean, allowed, attention, ratio, num_revealed, temperature, generator, exact) -> dict:
    """Scores, rightness and row of every revealed token of one batch, arrays of shape (M,)."""
    masked = allowed & (torch.rand(clean.shape, generator=generator) < ratio)  # (B, L)
    # The k smallest of uniform numbers are k positions drawn without replacement.
    key = torch.rand(clean.shape, generator=generator).masked_fill(~masked, 2.0)
    revealed = masked & (key.argsort(-1).argsort(-1) < num_revealed)
    row = revealed.nonzero()[:, 0].numpy()
    if not revealed.any():
        return {"right": np.zeros(0, dtype=bool), "sequence": row}
    denoiser, head = pipe.denoiser, pipe.quality_head
    device = next((part.device for part in (getattr(pipe, "model", None),) if part is not None), clean.device)
    attention = None if attention is None else attention.long().to(device)
    z = clean.masked_fill(masked, pipe.mask_token_id).to(device)
    logits = denoiser.logits(denoiser.hidden(z, attention), revealed.to(device)).float().cpu()  # (M, V)
    own = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
    y = z.masked_scatter(revealed.to(device), tokens.to(device))
    hidden = denoiser.hidden(y, attention)
    seen = denoiser.logits(hidden, revealed.to(device)).float().cpu().softmax(-1)
    found = {"visible": seen.gather(1, tokens[:, None])[:, 0], "drawn": own.gather(1, tokens[:, None])[:, 0]}
    if head is not None:
        found["head"] = head(hidden, attention).float().sigmoid().cpu()[revealed]
    if exact is not None:
        found["exact"] = torch.as_tensor(exact(y.cpu(), revealed))
    found = {name: score.double().numpy().clip(0, 1) for name, score in found.items()}
    return {**found, "right": (tokens == clean[revealed]).numpy(), "sequence": row}


def _joined(parts: list[dict]) -> dict:
    """Arrays of the parts one after the other; parts without tokens have no scores."""
    filled = [part for part in parts if len(part["right"])]
    if not filled:
        return parts[0]
    return {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}


def _summary(tokens: dict, bins: int, resamples: int, seed: int) -> dict:
    """`calibration_measures` of every score, with intervals by a bootstrap over sequences."""
    right, found = tokens["right"], {}
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


def _as_mask(name: str, mask, ids) -> torch.Tensor:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = torch.as_tensor(np.asarray(mask)).bool()
    if mask.shape != ids.shape:
        raise ValueError(f"`{name}` must have the shape of `sequences`, {tuple(ids.shape)}, got {tuple(mask.shape)}.")
    return mask


def _bracket(interval) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"


def fit_temperature(quality, right) -> float:
    """The temperature that calibrates a quality head: what its logits are divided by before the sigmoid.

    It minimises the cross-entropy of sigmoid(logit(quality) / T) and `right`, which has one minimum in 1 / T. Fit it on
    the canvases that are to be judged, finished ones of runs with the scheduler in use on data that the head was not
    trained on, and store it: `head.register_to_config(temperature=T)`, then save. A head without one counts as not
    calibrated: `out.confidence` is None, and `select="confidence"` is refused.

    Args:
        quality: what the head said at temperature 1 (None in its config), probabilities (N,); one for each token.
        right: was the token right? bool (N,); or the probability of it, float in [0, 1] (N,), where that is what is
            known.
    Returns:
        T, above 0. Below 1 the head was not sure enough, above 1 too sure.
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


def risk_coverage(confidence, right) -> dict:
    """How many answers are wrong among the surest ones: what is gained by leaving the others to somebody else.

    Args:
        confidence: of each answer, anything that rises with it, (N,).
        right: was it right? bool (N,).
    Returns:
        {"coverage", "risk"}: lists of N numbers, the share of answers kept and the share of wrong ones among these,
        from the surest alone to all; ties in the order given. "area": the mean risk.
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
