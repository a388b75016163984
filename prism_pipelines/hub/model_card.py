"""The model cards of heads, adapters and whole pipelines: what it is, how it is used, what was measured."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..models import checks
from ..models.families import recipe_of
from ..models.quality_head import QualityHead
from ..schedulers import TokenCriticScheduler
from ..schedulers.protocol import Scheduler
from ..schedulers.validation import own_fields
from .files import is_hub_id, read_json

CARD_TAGS = ("diffusers", "prism", "masked-diffusion")
MEANINGS = {
    "PRISM": "It gives, in the same forward pass as the predictions, the probability that each visible token is right; "
    "at inference the least likely are masked again and refilled ([PRISM](https://arxiv.org/abs/2510.01384)).",
    "Token-Critic": "It gives the probability that each token comes from the data and was not written by the model, "
    "which says nothing about whether the token is right; at inference the whole text is filled and judged, and the "
    "tokens that the model most likely wrote are masked again ([Token-Critic](https://arxiv.org/abs/2209.04439)).",
}


def method(pipe: Any) -> str:
    """The method that a head was trained for, a key of `MEANINGS`, found by the recommended scheduler."""
    return "Token-Critic" if isinstance(pipe.scheduler, TokenCriticScheduler) else "PRISM"


def model_card(
    pipe: Any,
    base_model: str,
    base_revision: str | None,
    rank: int | None,
    facts: dict[str, Any],
    repo_id: str | None = None,
) -> ModelCard:
    """README.md of a head's repository; what is not known is left out."""
    kind, name = pipe.quality_head.config.architecture, shown_name(base_model)
    at = f" at revision `{base_revision}`" if base_revision else ""
    adapter = f"a LoRA adapter of rank {rank}" if rank else "no adapter: the backbone is as published"
    return card(
        data("peft" if rank else "diffusers", base_model, ["lora"] if rank else [], facts),
        f"# {method(pipe)} quality head for {Path(name).name}",
        f"A {kind} head on the last hidden states of `{name}`{at}, with {adapter}. {MEANINGS[method(pipe)]}",
        "## Use",
        usage(pipe, repo_id, facts),
        *([adapter_usage(pipe, base_model, base_revision, repo_id)] if rank else []),
        "## Recommended settings",
        settings(pipe.scheduler),
        *judging(pipe.quality_head, facts),
        *training(facts),
    )


def adapter_card(
    pipe: Any,
    base_model: str,
    base_revision: str | None,
    rank: int,
    facts: dict[str, Any],
    repo_id: str | None = None,
) -> ModelCard:
    """README.md of a plain adapter's repository; what is not known is left out."""
    name = shown_name(base_model)
    at = f" at revision `{base_revision}`" if base_revision else ""
    return card(
        data("peft", base_model, ["lora"], facts),
        f"# LoRA adapter for {Path(name).name}",
        f"An adapter of rank {rank} for `{name}`{at}, trained with the loss of masked diffusion.",
        "## Use",
        usage(pipe, repo_id, facts),
        adapter_usage(pipe, base_model, base_revision, repo_id),
        *training(facts),
    )


def pipeline_card(pipe: Any, base_model: str | None, facts: dict[str, Any], repo_id: str | None = None) -> ModelCard:
    """README.md of a whole pipeline's repository; what is not known is left out."""
    head = pipe.quality_head
    judged = "" if head is None else f" with a {method(pipe)} quality head ({head.config.architecture})"
    return card(
        data("diffusers", base_model, [], facts),
        f"# {Path(repo_id).name if repo_id else 'Masked diffusion pipeline'}",
        f"A masked diffusion language model, {type(pipe.model).__name__}{judged}, as a pipeline of `prism_pipelines`.",
        "## Use",
        usage(pipe, repo_id, facts),
        "## Recommended settings",
        settings(pipe.scheduler),
        *training(facts),
    )


def data(library: str, base_model: str | None, tags: list[str], facts: dict[str, Any]) -> ModelCardData:
    """The metadata of a card."""
    return ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=[*CARD_TAGS, *tags],
        base_model=base_model if is_hub_id(base_model) else None,
        license=facts.get("license"),
    )


def card(metadata: ModelCardData, *parts: str) -> ModelCard:
    """A card of metadata and paragraphs."""
    return ModelCard("\n\n".join([f"---\n{metadata}\n---", *parts]) + "\n")


def shown_name(base_model: str) -> str:
    """The Hub id of a base model, or the last part of its path, so that a card shows no paths of this machine."""
    return base_model if is_hub_id(base_model) else Path(base_model).name


def judging(head: QualityHead, facts: dict[str, Any]) -> list[str]:
    """The parts of a card about what a head learned, on which states, what it reads, and what it finds."""
    calibrated = head.config.get("temperature")
    about = {
        "It estimates": facts.get("target"),
        "Learned on": facts.get("states"),
        "It reads of the run": ", ".join(head.reads_context) if head.reads_context else None,
        "Temperature, fitted on held-out runs": f"{calibrated:g}" if calibrated else None,
    }
    rows, parts = [f"- {key}: {value}" for key, value in about.items() if value], []
    parts += ["## What it judges by", "\n".join(rows)] if rows else []
    parts += ["## What it finds on held-out runs", facts["detection"]] if "detection" in facts else []
    return parts


def training(facts: dict[str, Any]) -> list[str]:
    """The parts of a card about training and what was measured."""
    about = {
        "Data": facts.get("dataset"),
        "Steps": facts.get("steps"),
        "Hardware": facts.get("hardware"),
        "Versions": ", ".join(f"{key} {value}" for key, value in facts.get("versions", {}).items()),
    }
    rows, parts = [f"- {key}: {value}" for key, value in about.items() if value], []
    if "command" in facts:
        rows.append(f"\n```bash\n{facts['command']}\n```")
    if rows:
        parts += ["## Training", "\n".join(rows)]
    table = [f"| {key} | {value:.4g} |" for key, value in facts.get("metrics", {}).items() if value is not None]
    if table:
        parts += ["## Held-out metrics", "\n".join(["| measure | value |", "| --- | --- |", *table])]
    if facts.get("figure"):
        parts.append("![Reliability of the head: share right against the quality it claims](calibration.png)")
    return parts


def usage(pipe: Any, repo_id: str | None, facts: dict[str, Any]) -> str:
    """The code by which a reader loads the repository and generates. `repo_id` of None is for a folder."""
    frame = sum(map(len, pipe.text_frame))
    length = min(32, (checks.max_length(pipe.model.config) or 32 + frame) - frame)
    what, shown = "num_samples=1, ", "out.texts[0]"
    if pipe.tokenizer is None:
        shown = "out.sequences[0]"
    elif getattr(pipe.tokenizer, "chat_template", None):
        what = '"Write a haiku.", ' + "".join(f"{name}={value!r}, " for name, value in facts.get("call", {}).items())
    written = ', output_type="seq"' if pipe.tokenizer is None else ""
    lines = [
        "```python",
        "from prism_pipelines import PrismPipeline",
        "",
        f'pipe = PrismPipeline.from_pretrained("{repo_id or "."}")',
        f"out = pipe({what}gen_length={length}, num_inference_steps={length}{written})",
        f"print({shown})",
        "```",
    ]
    return "\n".join(lines)


def adapter_usage(pipe: Any, base_model: str, base_revision: str | None, repo_id: str | None) -> str:
    """How the adapter is loaded without this package."""
    kind = type(pipe.model).__name__
    base = f'"{shown_name(base_model)}"'
    with contextlib.suppress(OSError):  # a Hub that does not answer is no reason not to save a head
        if read_json(base_model, "model_index.json", {"revision": base_revision}) is not None:
            base += ', subfolder="model"'  # of a saved pipeline
    if recipe_of(pipe.spec).key_mapping:
        return f"The adapter alone is an ordinary PEFT adapter for {kind}, under whose names the base model is loaded."
    lines = [
        "The adapter alone, without this package:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'model = PeftModel.from_pretrained({kind}.from_pretrained({base}), "{repo_id or "."}")',
        "```",
    ]
    return "\n".join(lines)


def settings(scheduler: Scheduler) -> str:
    """The scheduler's settings that differ from the defaults of its class."""
    plain = own_fields(type(scheduler)())
    changed = {key: value for key, value in own_fields(scheduler).items() if value != plain[key]}
    words = ", ".join(f"{key}={value!r}" for key, value in sorted(changed.items()))
    return f"`{type(scheduler).__name__}({words})`, loaded with the head."
