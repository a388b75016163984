"""Quality heads and LoRA adapters of a pipeline: load, switch, fuse, save and share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hub import adapters, heads
from .hub.files import absence, inside, reachable, read_json
from .hub.saved_model import refuse_stale, save_model
from .models.quality_head import QualityHead
from .schedulers import MDLMScheduler

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as _Base

    from .models.denoiser import MaskedDenoiser
    from .models.families import MDMSpec
else:
    _Base = object


class QualityHeadMixin(_Base):
    """The part of `PrismPipeline` that loads heads and adapters, as diffusers' loader mixins do for its pipelines.

    Each head has a name. If a head came with a LoRA adapter, the adapter has the same name in the model. The user's own
    adapters stay active together with the head's.
    """

    model: Any
    tokenizer: Any
    quality_head: Any
    scheduler: Any
    _revision: str | None
    config: Any
    if TYPE_CHECKING:

        @property
        def spec(self) -> MDMSpec:
            """Of `PrismPipeline`."""

        @property
        def denoiser(self) -> MaskedDenoiser:
            """Of `PrismPipeline`."""

    def load_quality_head(
        self,
        quality_head: QualityHead | str,
        *,
        name: str = "prism",
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a quality head, and the LoRA adapter that it was trained with if there is one, and use them.

        If this is the first head and the scheduler never remasks, the scheduler is replaced: by the one recommended
        with the head, or by `PrismScheduler`. Any other scheduler stays.

        Args:
            quality_head: `QualityHead`, or a folder or Hub id that has one in `quality_head/`.
            name: name of the head and its adapter in this pipeline; an earlier head of that name is replaced.
            revision, cache_dir, token, local_files_only: as in huggingface_hub.
        Raises:
            ValueError: the head was made for another hidden size or another model, or the model has an adapter `name`
                that belongs to no head.
            TypeError: `quality_head` is neither a head nor a path or id.
            OSError: there is no head in that folder or repository.
        """
        hub_kwargs = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        heads.check_scheduler(self.scheduler)
        if isinstance(quality_head, (str, Path)):
            hub_kwargs = reachable(str(quality_head), hub_kwargs)
        is_first = not self._heads
        self._take_head(quality_head, name, hub_kwargs)
        if is_first and not self.scheduler.can_remask:
            self.scheduler = heads.scheduler_for(quality_head, self.scheduler, hub_kwargs)

    def _take_head(self, quality_head: QualityHead | str, name: str, hub_kwargs: dict) -> None:
        """`load_quality_head` without the change of scheduler."""
        source = heads.head_place(quality_head)
        head: Any = quality_head if source is None else heads.load_head(source, hub_kwargs)
        heads.check_head(head, self.model, getattr(self, "_revision", None))
        if name in self._heads:
            adapters.drop_adapter(self.model, name)
            self._with_adapter.discard(name)
            if self._heads.pop(name) is self.quality_head:
                self.register_modules(quality_head=None)
        elif source is not None:
            adapters.refuse_taken(self.model, name)
        adapter = None if source is None else adapters.adapter_subfolder(source, hub_kwargs)
        if source is not None and adapter is not None:
            adapters.load_adapter(self.model, source, name, hub_kwargs, adapter, self.spec)
            self._with_adapter.add(name)
        self._heads[name] = head
        self.set_quality_head(name)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a LoRA adapter, and activate it together with those that are active.

        For the repository of a head this is the same as `load_quality_head`.

        Args:
            pretrained_model_name_or_path: folder or Hub id of a PEFT adapter, or of a head.
            adapter_name: name of the adapter in this pipeline. None for "default", or for "prism" with a head.
            subfolder: folder of the adapter in the repository.
            revision, cache_dir, token, local_files_only: as in huggingface_hub.
        Raises:
            ValueError: the model has an adapter of that name; or the new one does not fit the model, or is more than
                LoRA.
            OSError: there is no adapter, or its weights are not safetensors.
        """
        path = str(pretrained_model_name_or_path)
        hub_kwargs: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        hub_kwargs = reachable(path, hub_kwargs)
        if not subfolder and heads.head_config(path, hub_kwargs) is not None:
            return self.load_quality_head(path, name=adapter_name or "prism", **hub_kwargs)
        config = inside(subfolder, "adapter_config.json")
        if read_json(path, config, hub_kwargs) is None:
            raise OSError(f"No LoRA adapter: {absence(path, config, hub_kwargs)}.")
        name, before = adapter_name or "default", adapters.active_adapters(self.model)
        adapters.refuse_taken(self.model, name)
        adapters.load_adapter(self.model, path, name, hub_kwargs, subfolder, self.spec)
        adapters.use_adapters(self.model, [*before, name])

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Remove one of the user's adapters from the model. If adapters are fused, all fused ones go together.

        The weights stay fused, and can no longer be unfused.

        Args:
            adapter_name: name of the adapter. None for all adapters except those of heads, or for all fused ones.
        Raises:
            ValueError: no adapter has that name, it belongs to a head (see `unload_quality_head`), or it is fused
                together with others.
        """
        held, fused = adapters.adapter_names(self.model), adapters.fused_adapters(self.model)
        own = [] if fused else [name for name in held if name not in self._heads]
        names = (fused or own) if adapter_name is None else [adapter_name]
        if fused and sorted(names) != sorted(fused):
            raise ValueError(f"The adapters {fused} are fused, and go together: unload_lora_weights() without a name.")
        if not fused and not set(names) <= set(own):
            raise ValueError(f"{adapter_name!r} is none of the adapters that are not a quality head's: {own}.")
        for name in names:
            adapters.drop_adapter(self.model, name)
            self._with_adapter.discard(name)

    def fuse_lora(
        self, adapter_names: list[str] | None = None, lora_scale: float = 1.0, safe_fusing: bool = False
    ) -> None:
        """Add the active adapters to the weights of the model, as in diffusers. Then adapters cost no time.

        Args:
            adapter_names: the names of all active adapters; None for these.
            lora_scale: factor for the adapters' part of the weights.
            safe_fusing: raise an error if a weight would become NaN or inf.
        Raises:
            ValueError: no adapter is active; `adapter_names` are not the active ones; some are fused already; or, with
                `safe_fusing`, a weight would be NaN or inf.
        """
        adapters.fuse(self.model, adapter_names, lora_scale, safe_fusing)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, up to the rounding of the model's dtype.

        Raises:
            ValueError: nothing is fused.
        """
        adapters.unfuse(self.model)

    def push_to_hub(  # type: ignore[override]  # a head, not files: diffusers' keywords have no meaning
        self,
        repo_id: str,
        *,
        what: str = "head",
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the quality head with its adapter and settings, a few MB; or the whole pipeline.

        Args:
            repo_id: "owner/name" on the Hub; made if missing.
            what: "head" or "pipeline".
            base_model: Hub id of the backbone that the head belongs to; None for the one in the head's config.
            private, token, revision, commit_message: as `hub.publish.Commit`.
        Returns:
            URL of the commit.
        Raises:
            ValueError: another `what`, no head to upload, or a base model that is not on the Hub.
        """
        from .hub.publish import Commit, push_head_repo, push_pipeline

        if what not in ("head", "pipeline"):
            raise ValueError(f'`what` must be "head" or "pipeline", got {what!r}.')
        push = push_head_repo if what == "head" else push_pipeline
        return push(self, Commit(repo_id, private, token, revision, commit_message), base_model=base_model)

    @property
    def _heads(self) -> dict[str, QualityHead]:
        """Loaded heads by name. A head that was passed to the constructor is called "prism"."""
        if "_named_heads" not in self.__dict__:
            self.__dict__["_named_heads"] = {} if self.quality_head is None else {"prism": self.quality_head}
        return self.__dict__["_named_heads"]

    @property
    def _with_adapter(self) -> set[str]:
        """Names of the heads that came with an adapter."""
        if "_tuned" not in self.__dict__:
            self.__dict__["_tuned"] = set(self._heads) & set(adapters.adapter_names(self.model))
        return self.__dict__["_tuned"]

    def _check_adapter(self, name: str | None = None) -> None:
        """Raise a ValueError if the adapter of a head, by default the one in use, is gone from the model."""
        name = name or next((name for name, head in self._heads.items() if head is self.quality_head), None)
        heads.check_adapter(name, self._with_adapter, self.model)

    def _use_adapter(self, name: str | None) -> None:
        """Activate the adapter of the head `name`, or of no head for None. The user's adapters stay active."""
        users = [other for other in adapters.active_adapters(self.model) if other not in self._heads]
        adapters.use_adapters(self.model, users if name is None else [*users, name])

    def _head_adapter(self) -> str | None:
        """Name of the adapter of the head in use, or None if it has none."""
        name = next((name for name, head in self._heads.items() if head is self.quality_head), None)
        return name if name in adapters.adapter_names(self.model) else None

    def _place(self, head: QualityHead) -> QualityHead:
        """The head, moved to the device of the canvas, where the hidden states arrive."""
        return head.to(self._execution_device)

    def save_pretrained(  # type: ignore[override]  # all that diffusers' takes is handed on
        self, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers. The user's adapters and that of the head in use are saved too, see `hub/saved_model.py`.

        Raises:
            ValueError: the folder holds parts of an earlier pipeline that would be loaded together with this one.
        """
        folder, mine = Path(save_directory), self._head_adapter()
        if not adapters.adapter_names(self.model):
            refuse_stale(folder / "model", "adapter*", "an adapter", "whole model")
            with self.denoiser.lock:  # a forward pass of another thread changes the config for a moment
                return super().save_pretrained(save_directory, *args, **kwargs)
        names = {name: name for name in adapters.adapter_names(self.model) if name not in self._heads}
        if mine is not None and "prism" in names:
            raise ValueError(
                'An adapter of yours is called "prism", as that of a saved head will be. Load it under another name.'
            )
        names |= {} if mine is None else {mine: "prism"}
        whole = None

        def save(model_folder: str, **_: Any) -> None:
            nonlocal whole
            whole = save_model(self.model, Path(model_folder), names)

        self.model.save_pretrained = save  # diffusers calls it; transformers' own would write one adapter and no more
        try:
            with self.denoiser.lock:
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.model.save_pretrained
        if whole and self.quality_head is not None:
            from .hub.publish import rewrite

            rewrite(folder / "quality_head" / "config.json", heads.fingerprints(self.model))

    def set_quality_head(self, name: str) -> None:
        """Switch to a loaded head and its adapter.

        Raises:
            ValueError: no head of that name.
        """
        if name not in self._heads:
            raise ValueError(f"No quality head is called {name!r}; loaded: {sorted(self._heads) or 'none'}.")
        self._check_adapter(name)
        self._use_adapter(name)
        self.register_modules(quality_head=self._place(self._heads[name]))

    def unload_quality_head(self, name: str | None = None) -> None:
        """Remove a head and its adapter.

        Other heads are not used until `set_quality_head` is called. If no head is left and the scheduler needs one, the
        scheduler is replaced by `MDLMScheduler`, with a warning.

        Args:
            name: name of the head; None for all heads.
        Raises:
            ValueError: no head has that name.
        """
        heads.check_scheduler(self.scheduler)
        if name is not None and name not in self._heads:
            raise ValueError(f"No quality head is called {name!r}; loaded: {sorted(self._heads) or 'none'}.")
        for gone in list(self._heads) if name is None else [name]:
            in_use = self._heads.pop(gone) is self.quality_head
            adapters.drop_adapter(self.model, gone)
            self._with_adapter.discard(gone)
            if in_use:
                self.register_modules(quality_head=None)
        if name is None and self.quality_head is not None:  # a head that was set as an attribute
            self.register_modules(quality_head=None)
        if not self._heads and self.quality_head is None and self.scheduler.needs_quality:
            warnings.warn("The scheduler needed the head; the pipeline goes on with MDLMScheduler.", stacklevel=2)
            self.scheduler = MDLMScheduler.from_config(self.scheduler.config)
