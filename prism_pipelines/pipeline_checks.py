"""Checks of the arguments of `PrismPipeline.__call__`; the errors name the argument."""

from __future__ import annotations

from typing import Any

import torch

from .hub import heads
from .models import checks
from .models.families import supports_all_masked_input
from .models.quality_head import QualityHead
from .sampling.canvas import Canvas
from .schedulers.validation import check_run, is_int, is_number


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless the argument `name` is an integer of at least 1."""
    if not is_int(value, 1):
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_optional_counts(**counts: int | None) -> None:
    """Raise a ValueError unless each argument is None or an integer of at least 1, and the steps are not too many."""
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)
            if name == "num_inference_steps":
                check_run(value, None)


def check_scheduler_and_head(pipe: Any, return_quality: bool, select: str | None, num_samples: int) -> None:
    """Raise a ValueError if the scheduler or an output needs a head and there is none, or it is not calibrated."""
    heads.check_scheduler(pipe.scheduler)
    if pipe.quality_head is None and pipe.scheduler.needs_quality:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} remasks by quality, and this pipeline has no quality head. Pass "
            "quality_head=... to from_pretrained or call pipe.load_quality_head(...); or, without a head, use "
            "scheduler=SelfConfidenceScheduler() (training-free) or MDLMScheduler() (no remasking)."
        )
    pipe._check_adapter()
    if pipe.quality_head is None and return_quality:
        raise ValueError("`return_quality` needs a quality head; this pipeline has none.")
    if select not in (None, "confidence"):
        raise ValueError(f'`select` must be None or "confidence", got {select!r}.')
    if select is not None and num_samples < 2:
        raise ValueError(f"`select` chooses among `num_samples` of at least 2, got {num_samples}.")
    if select is not None:
        check_calibrated(pipe.quality_head, '`select="confidence"`')


def check_calibrated(quality_head: QualityHead | None, name: str) -> None:
    """Raise a ValueError unless the quality of a head is a probability, which `name` needs."""
    if not is_calibrated(quality_head):
        head = "no quality head" if quality_head is None else "a quality head without a fitted temperature"
        raise ValueError(
            f"{name} needs a calibrated quality head, and this pipeline has {head}. Calibrate one with "
            "prism_pipelines.evaluation.fit_temperature."
        )


def is_calibrated(quality_head: QualityHead | None) -> bool:
    """Is the quality of a head a calibrated probability? Yes if its config has a fitted temperature."""
    return quality_head is not None and quality_head.config.get("temperature") is not None


def check_settings(
    config: Any, gen_length: int | None, output_type: str, cfg_scale: float | None, logits_processor: object
) -> None:
    """Raise a ValueError or TypeError for settings that are wrong, or that a model with this config cannot use."""
    limit = checks.max_length(config)
    if gen_length is not None and limit is not None and gen_length > limit:
        raise ValueError(f"`gen_length` is {gen_length}, and the model takes {limit} tokens at most.")
    if output_type not in ("text", "seq"):
        raise ValueError(f'`output_type` must be "text" or "seq", got {output_type!r}.')
    if cfg_scale is not None and not is_number(cfg_scale, 0):
        raise ValueError(f"`cfg_scale` must be None or a number of at least 0, got {cfg_scale!r}.")
    if cfg_scale and not supports_all_masked_input(config):
        raise ValueError(
            f"`cfg_scale` is {cfg_scale}, and guidance compares with a row of masks alone, which this model (ESM, "
            "token_dropout) cannot read. Pass None."
        )
    if logits_processor is not None and not callable(logits_processor):
        raise TypeError(f"`logits_processor` must be callable or None, got {type(logits_processor).__name__}.")


def callback_inputs(names: list[str] | None, known: list[str]) -> list[str]:
    """The names in `callback_on_step_end_tensor_inputs`, or all `known` ones for None.

    Raises:
        ValueError: a name is not in `known`.
    """
    names = known if names is None else names
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may hold {known}, got {unknown}.")
    return names


def check_canvas(config: Any, canvas: Canvas, generator: object) -> None:
    """Raise a ValueError or TypeError for a canvas that the model cannot read, or generators that do not fit it."""
    rows, length = canvas.sample.shape
    limit = checks.max_length(config)
    if limit is not None and length > limit:
        raise ValueError(f"The canvas has {length} tokens, and the model takes {limit} at most. Shorten the input.")
    low, high = int(canvas.sample.min()), int(canvas.sample.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"The input holds id {wrong}; the model knows ids from 0 to {config.vocab_size - 1}.")
    each = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in each):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r:.80}.")
    if isinstance(generator, (list, tuple)) and len(generator) != rows:
        raise ValueError(f"`generator` is a list of {len(generator)}, but there are {rows} rows. Pass one for each.")
