"""PRISM inside diffusers' own pipelines: the quality of a token gets to the scheduler past a loop that knows none.

Such a pipeline hands its scheduler logits and nothing else. Hooks on the model see the hidden states on their way into
the output head, score them, and deliver the result to the scheduler before its step.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch

from ..hub import adapters, heads
from ..hub.files import reachable
from ..models.quality_head import QualityHead
from ..schedulers import MDLMScheduler, PrismScheduler, SelfConfidenceScheduler
from ..schedulers.llada2 import deliver_quality, deliver_wanted

ADAPTER = "prism"
OURS = (PrismScheduler, SelfConfidenceScheduler, MDLMScheduler)
_NAMES = ", ".join(kind.__name__ for kind in OURS)


@dataclass
class _Enabled:
    """What `disable_prism` has to undo."""

    scheduler: object
    handles: list = field(default_factory=list)
    adapter: bool = False
    former_adapters: list[str] = field(default_factory=list)
    attention_mask: torch.Tensor | None = None
    installed: object = None  # the scheduler in the place of that one
    with_head: bool = False


def enable_prism(
    pipe,
    quality_head: QualityHead | str | None,
    *,
    scheduler=None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> None:
    """Let an unmodified diffusers pipeline for masked diffusion (`LLaDA2Pipeline`) correct itself.

    Each forward pass of `pipe.model` then also scores its tokens, and `pipe.scheduler` remasks the worst. Called again,
    it replaces the head. Undone by `disable_prism`.

    Args:
        pipe: a pipeline with `model` and `scheduler`.
        quality_head: `QualityHead`, or a folder or Hub id that has one in `quality_head/`; a LoRA adapter that lies
            there is loaded into the model too. None for no head: a scheduler without one is told where `gen_length`
            ends, and fills and remasks nothing beyond.
        scheduler: one that runs in `LLaDA2Pipeline`. None keeps a `PrismScheduler` in use; else takes that
            recommended with the head, or makes one from the config of the pipeline's own. Without a head it keeps
            one of ours, or makes a `SelfConfidenceScheduler`.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.
    Raises:
        TypeError: `pipe` has no model with an output head, `quality_head` is neither a head nor a place, or
            `scheduler` does not run there.
        ValueError: the head was made for another model or reads a run context, or the model has an adapter called
            "prism" already.
        OSError: no head there.
    Warns:
        UserWarning: the scheduler recommended with the head does not run there; a `PrismScheduler` takes its place.
    """
    model = getattr(pipe, "model", None)
    output_head = getattr(model, "get_output_embeddings", lambda: None)()
    if output_head is None or not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"`pipe` must have a scheduler and a model with get_output_embeddings(); got {type(pipe).__name__}."
        )
    if scheduler is not None and not _runs_in_blocks(scheduler):
        raise TypeError(f"`scheduler` must be one of {_NAMES}, which run in blocks; got {type(scheduler).__name__}.")
    hub_kwargs = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    source = None if quality_head is None else heads.head_place(quality_head)
    hub_kwargs = hub_kwargs if source is None else reachable(source, hub_kwargs)
    head = quality_head if source is None else heads.load_head(source, hub_kwargs)
    if head is not None:
        _check_head(head, model, output_head)
    if source is not None and not getattr(getattr(pipe, "_prism", None), "adapter", False):
        adapters.refuse_taken(model, ADAPTER)
    recommended = None if source is None else heads.load_scheduler(source, hub_kwargs)
    adapter = None if source is None else adapters.adapter_subfolder(source, hub_kwargs)

    kept = PrismScheduler if head is not None else OURS
    in_use = pipe.scheduler if isinstance(pipe.scheduler, kept) else None
    if recommended is not None and not _runs_in_blocks(recommended):
        if scheduler is None and in_use is None:
            warnings.warn(
                f"{source!r} recommends {type(recommended).__name__}, which does not run in {type(pipe).__name__}; "
                "a PrismScheduler takes its place. PrismPipeline runs it.",
                stacklevel=2,
            )
        recommended = None
    disable_prism(pipe)  # only now, so that a head that cannot be loaded leaves everything as it was
    enabled = pipe._prism = _Enabled(pipe.scheduler, former_adapters=adapters.active_adapters(model))
    if adapter is not None:
        adapters.load_adapter(model, source, ADAPTER, hub_kwargs, adapter)
        adapters.use_adapters(model, [*enabled.former_adapters, ADAPTER])
        enabled.adapter = True
    default = SelfConfidenceScheduler if head is None else PrismScheduler
    pipe.scheduler = scheduler or in_use or recommended or default.from_config(pipe.scheduler.config)
    enabled.installed, enabled.with_head = pipe.scheduler, head is not None

    def note_padding(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        enabled.attention_mask = mask if mask is not None and mask.ndim == 2 else None
        deliver_wanted(pipe.scheduler, None if enabled.attention_mask is None else enabled.attention_mask.bool())

    def score(module, args):
        hidden, attention_mask = args[0], enabled.attention_mask  # (B, W, H), (B, W)
        if head is None or not getattr(pipe.scheduler, "needs_quality", False):
            return
        with torch.no_grad():
            quality = head.to(hidden.device)(hidden, attention_mask).sigmoid()
        deliver_quality(pipe.scheduler, quality)

    enabled.handles = [
        model.register_forward_pre_hook(note_padding, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(score),
    ]


def _runs_in_blocks(scheduler) -> bool:
    """Can `LLaDA2Pipeline` drive it? It asks its scheduler when a block is done."""
    return hasattr(scheduler, "check_block_should_continue")


def _check_head(head: QualityHead, model, output_head) -> None:
    """Raise a ValueError if the head was made for another model, by its config or else its output head.

    Or if it reads what the run knows: diffusers' loop tells nobody when a token was written, nor what it saw first.
    """
    if head.reads_context:
        raise ValueError(
            f"This quality head reads what the run knows (context={', '.join(head.reads_context)}), and diffusers' "
            "loop records none of it. PrismPipeline.from_pipe(pipe, quality_head=...) runs it on the same model; or "
            "pass a head without context."
        )
    if hasattr(model, "config"):
        heads.check_head(head, model)
    width = getattr(output_head, "in_features", head.config.hidden_size)
    if width != head.config.hidden_size:
        raise ValueError(
            f"`quality_head` was made for hidden size {head.config.hidden_size}, and the output head of "
            f"{type(model).__name__} reads {width}. Load the head of this model."
        )


def disable_prism(pipe) -> None:
    """Undo `enable_prism`; else does nothing.

    Hooks and adapter are removed, and the scheduler from before comes back, unless another was put in the place of
    that installed meanwhile. A `PrismScheduler` that would be without its head goes in any case.
    """
    enabled = getattr(pipe, "_prism", None)
    if enabled is None:
        return
    for handle in enabled.handles:
        handle.remove()
    if enabled.adapter:
        adapters.drop_adapter(pipe.model, ADAPTER)
        adapters.use_adapters(pipe.model, enabled.former_adapters)
    deliver_quality(pipe.scheduler, None)
    deliver_wanted(pipe.scheduler, None)
    without_head = enabled.with_head and isinstance(pipe.scheduler, PrismScheduler)
    if pipe.scheduler is enabled.installed or without_head:
        pipe.scheduler = enabled.scheduler
    pipe._prism = None
