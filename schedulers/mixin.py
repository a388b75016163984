"""What all our schedulers have in common: their config, and the timesteps of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin

from .functional import Device
from .validation import check_run, loop_steps

# Names that fields had in configs saved by earlier versions: {class: {then: now}}.
FORMER_NAMES = {
    "P2Scheduler": {"eta": "remask_strength"},
    "TokenToMaskScheduler": {"threshold": "remask_threshold"},
    "JudgeAndRepairScheduler": {"quality_threshold": "doubt_threshold"},
}


class MDMSchedulerMixin(SchedulerMixin, ConfigMixin):
    """Schedulers of masked diffusion models.

    A config field has one meaning in all of them. `from_config` of class B reads the fields that B has from the config
    of any class A, and keeps the other fields too. So A -> B -> A gives A's config back.
    """

    config: Any  # diffusers': a dict whose keys are attributes too
    order = 1  # diffusers': forward passes per timestep. The order of revealing is config.order.
    num_inference_steps: Any = None  # T, an int once a run has begun
    timesteps: Any = None  # int64 (T,), and more for a loop
    _memory: Any = None  # what a rule notes from step to step of a run
    _warned = False

    @property
    def needs_quality(self) -> bool:
        """Does `step` want `quality`?"""
        return False

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return True

    def _warn_once(self, message: str, stacklevel: int) -> None:
        """As `warnings.warn`, in the first such step alone."""
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=stacklevel + 1)

    def set_timesteps(self, num_inference_steps: int, device: Device = None, block_length: int | None = None) -> None:
        """Begin a run of `num_inference_steps` steps, and of `loop_steps` more if there is such a field.

        Args:
            num_inference_steps: T, at least 1.
            device: accepted because diffusers' loops pass it. `timesteps` stay on the CPU: they are only counted, and
                reading one back from a GPU in every step would make the step wait for it.
            block_length: accepted because diffusers' loops pass it; blocks come in through `generation_mask`.
        Raises:
            ValueError: a number below 1.
        """
        check_run(num_inference_steps, block_length)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps + loop_steps(self))
        self._memory = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler from the config of another, ours or one of diffusers'; keyword arguments replace fields.

        `num_remask`, `eta` or `quality_threshold` as a keyword argument also drops those of the three in the config
        that exclude it.
        """
        if isinstance(config, Mapping):
            config = _without_excluded(_with_present_names(config), kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Classes whose fields a config may hold, unknown to this class, without a warning of diffusers."""
        return list(_subclasses(MDMSchedulerMixin))


def _subclasses(kind: type) -> Iterator[type]:
    below: type
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the names that fields have now; one that was saved says by which class."""
    # With `_use_default_values` diffusers would give a field that A left at its default the default of B.
    gone = ("_fields_as", "_use_default_values", "accept_quality")
    present = {name: value for name, value in config.items() if name not in gone}
    saved_by = config.get("_fields_as", config.get("_class_name"))  # of a user's subclass: that of our rule
    for then, now in FORMER_NAMES.get(saved_by, {}).items():
        if then in present and now not in present:
            present[now] = present.pop(then)
    if config.get("accept_quality") is not None:  # which had no `max_share`
        present |= {"quality_threshold": config["accept_quality"], "max_share": 1.0}
    return present


def _without_excluded(config: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the fields that exclude an amount of remasking which is given with it."""
    excluded: set[str] = set()
    if given.get("eta") is not None:
        excluded |= {"num_remask", "quality_threshold"}
    if given.get("num_remask") is not None or given.get("quality_threshold") is not None:
        excluded |= {"eta", "eta_schedule"}
    if given.get("num_remask") == 0:
        excluded.add("quality_threshold")
    if given.get("quality_threshold") is not None and config.get("num_remask") == 0:
        excluded.add("num_remask")
    return {name: value for name, value in config.items() if name not in excluded}
