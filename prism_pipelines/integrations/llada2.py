"""PRISM inside diffusers' own `LLaDA2Pipeline`, whose loop passes no quality to the scheduler.

The pipeline gives its scheduler only logits. Two hooks on the model catch the input of the output head, score it, and
put the result into the scheduler's inbox before each step.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hub import adapters, heads
from ..hub.files import reachable
from ..models.quality_head import QualityHead
from ..schedulers import MDLMScheduler, PrismScheduler, SelfConfidenceScheduler
from ..schedulers.llada2 import Inbox
from ..schedulers.protocol import Scheduler

ADAPTER = "prism"
OURS = (PrismScheduler, SelfConfidenceScheduler, MDLMScheduler)


class _Judge:
    """The two hooks of a model, which fill the inbox of the pipeline's scheduler in every forward pass."""

    def __init__(self, pipe: Any, head: QualityHead | None):
        self.pipe, self.head = pipe, head
        self.attention_mask: Tensor | None = None  # of the forward pass under way, 0 at padding, (B, W)

    @property
    def inbox(self) -> Inbox | None:
        """Of the scheduler that the pipeline has now; None for one that does not run here."""
        return getattr(self.pipe.scheduler, "inbox", None)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the scheduler which positions are kept. The pipeline masks those beyond `gen_length` as padding."""
        mask = kwargs.get("attention_mask")
        self.attention_mask = mask if mask is not None and mask.ndim == 2 else None
        if self.inbox is not None:
            self.inbox.kept = None if self.attention_mask is None else self.attention_mask.bool()

    def before_output_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Tells the scheduler the quality of each token, from the hidden states (B, W, H) before the output head."""
        if self.head is None or self.inbox is None or not getattr(self.pipe.scheduler, "needs_quality", False):
            return
        with torch.no_grad():
            self.inbox.quality = self.head.to(args[0].device)(args[0], self.attention_mask).sigmoid()


@dataclass
class _Enabled:
    """What `disable_prism` has to undo."""

    scheduler: Any  # the one from before
    former_adapters: list[str]
    with_head: bool
    adapter: bool = False
    installed: Any = None  # the scheduler that took its place
    handles: list[Any] = field(default_factory=list)


class _Source(NamedTuple):
    """A head and what was found where it was loaded from; a head that was passed as it is comes alone."""

    head: QualityHead | None
    path: str = ""
    hub_kwargs: dict[str, Any] | None = None
    adapter: str | None = None  # subfolder of its LoRA adapter
    scheduler: Scheduler | None = None  # recommended with it


def enable_prism(
    pipe: Any,
    quality_head: QualityHead | str | None,
    *,
    scheduler: Scheduler | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> None:
    """Let an unmodified diffusers pipeline for masked diffusion (`LLaDA2Pipeline`) correct itself.

    Each forward pass of `pipe.model` then also scores its tokens, and `pipe.scheduler` remasks the worst of them. A
    second call replaces the head. `disable_prism` undoes it.

    Args:
        pipe: a pipeline with `model` and `scheduler`.
        quality_head: `QualityHead`, or a folder or Hub id that has one in `quality_head/`. A LoRA adapter in that
            repository is loaded into the model too. With None there is no head: the scheduler only gets to know where
            `gen_length` ends, and writes nothing after it.
        scheduler: a scheduler that runs in `LLaDA2Pipeline`. None keeps a `PrismScheduler` in use. Otherwise None takes
            the scheduler recommended with the head, or makes a `PrismScheduler` from the config of the one in use.
            Without a head, None keeps a scheduler of this package, or makes a `SelfConfidenceScheduler`.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.
    Raises:
        TypeError: `pipe` has no model with an output head, `quality_head` is neither a head nor a path or id, or
            `scheduler` does not run in `LLaDA2Pipeline`.
        ValueError: the head was made for another model or reads a run context, or the model already has an adapter
            called "prism".
        OSError: there is no head in that folder or repository.
    Warns:
        UserWarning: the scheduler recommended with the head does not run in `LLaDA2Pipeline`, so a `PrismScheduler`
            takes its place.
    """
    _check_parts(pipe, scheduler)
    model = pipe.model
    hub_kwargs = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    source = _find_head(pipe, quality_head, hub_kwargs)
    kept = OURS if source.head is None else (PrismScheduler,)
    chosen = scheduler or (pipe.scheduler if isinstance(pipe.scheduler, kept) else None) or _recommended(source, pipe)
    disable_prism(pipe)  # only now, so that a head that cannot be loaded leaves everything as it was
    enabled = _Enabled(pipe.scheduler, adapters.active_adapters(model), with_head=source.head is not None)
    pipe._prism = enabled
    if source.adapter is not None:
        adapters.load_adapter(model, source.path, ADAPTER, source.hub_kwargs or {}, source.adapter)
        adapters.use_adapters(model, [*enabled.former_adapters, ADAPTER])
        enabled.adapter = True
    default = SelfConfidenceScheduler if source.head is None else PrismScheduler
    pipe.scheduler = enabled.installed = chosen or default.from_config(pipe.scheduler.config)
    judge = _Judge(pipe, source.head)
    enabled.handles = [
        model.register_forward_pre_hook(judge.before_forward, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(judge.before_output_head),
    ]


def _check_parts(pipe: Any, scheduler: Scheduler | None) -> None:
    """Raise a TypeError for a pipeline without model or scheduler, or a scheduler that does not run there."""
    model = getattr(pipe, "model", None)
    if getattr(model, "get_output_embeddings", lambda: None)() is None or not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"`pipe` must have a scheduler and a model with get_output_embeddings(); got {type(pipe).__name__}."
        )
    if scheduler is not None and not _runs_in_blocks(scheduler):
        names = ", ".join(kind.__name__ for kind in OURS)
        raise TypeError(f"`scheduler` must be one of {names}, which run in blocks; got {type(scheduler).__name__}.")


def _find_head(pipe: Any, quality_head: QualityHead | str | None, hub_kwargs: dict[str, Any]) -> _Source:
    """Load and check a head, and look for its adapter and scheduler; arguments and errors as `enable_prism`."""
    if quality_head is None:
        return _Source(None)
    if isinstance(quality_head, QualityHead):
        _check_head(quality_head, pipe.model)
        return _Source(quality_head)
    path = str(heads.head_place(quality_head))
    hub_kwargs = reachable(path, hub_kwargs)
    head = heads.load_head(path, hub_kwargs)
    _check_head(head, pipe.model)
    if not getattr(getattr(pipe, "_prism", None), "adapter", False):
        adapters.refuse_taken(pipe.model, ADAPTER)
    adapter, scheduler = adapters.adapter_subfolder(path, hub_kwargs), heads.load_scheduler(path, hub_kwargs)
    return _Source(head, path, hub_kwargs, adapter, scheduler)


def _recommended(source: _Source, pipe: Any) -> Any:
    """The scheduler that is recommended with a head, if it runs there; else None, with a warning if there is one."""
    if source.scheduler is None or _runs_in_blocks(source.scheduler):
        return source.scheduler
    warnings.warn(
        f"{source.path!r} recommends {type(source.scheduler).__name__}, which does not run in {type(pipe).__name__}; "
        "a PrismScheduler takes its place. PrismPipeline runs it.",
        stacklevel=3,
    )
    return None


def _runs_in_blocks(scheduler: Scheduler) -> bool:
    """Can `LLaDA2Pipeline` drive it? That pipeline asks its scheduler when a block is done."""
    return hasattr(scheduler, "check_block_should_continue")


def _check_head(head: QualityHead, model: Any) -> None:
    """Raise a ValueError if the head was made for another model, by its config or else its output head.

    A head that reads the run context is refused too: diffusers' loop does not record when a token was written, nor the
    first hidden states.
    """
    if head.reads_context:
        raise ValueError(
            f"This quality head reads the run context (context={', '.join(head.reads_context)}), and diffusers' loop "
            "does not record it. PrismPipeline.from_pipe(pipe, quality_head=...) runs it on the same model; or pass a "
            "head without context."
        )
    if hasattr(model, "config"):
        heads.check_head(head, model)
    width = getattr(model.get_output_embeddings(), "in_features", head.config.hidden_size)
    if width != head.config.hidden_size:
        raise ValueError(
            f"`quality_head` was made for hidden size {head.config.hidden_size}, and the output head of "
            f"{type(model).__name__} reads {width}. Load the head of this model."
        )


def disable_prism(pipe: Any) -> None:
    """Undo `enable_prism`. Does nothing if that was not called.

    Hooks and adapter are removed. The earlier scheduler comes back, unless the user has set another one since. A
    `PrismScheduler`, which needs the head, is replaced in any case.
    """
    enabled: _Enabled | None = getattr(pipe, "_prism", None)
    if enabled is None:
        return
    for handle in enabled.handles:
        handle.remove()
    if enabled.adapter:
        adapters.drop_adapter(pipe.model, ADAPTER)
        adapters.use_adapters(pipe.model, enabled.former_adapters)
    if hasattr(pipe.scheduler, "inbox"):
        pipe.scheduler.inbox.take()
    without_head = enabled.with_head and isinstance(pipe.scheduler, PrismScheduler)
    if pipe.scheduler is enabled.installed or without_head:
        pipe.scheduler = enabled.scheduler
    pipe._prism = None
