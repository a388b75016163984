"""What the pipeline and its loop need of a scheduler. All schedulers here have it, and one of your own may."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .functional import Device, Generators
from .token_sampling import Logits


class Scheduler(Protocol):
    """A decoding rule: `set_timesteps` begins a run, and `step` is called once for each of `timesteps`.

    A scheduler that reads what the run knows of its tokens also has `reads_context`, names of
    `schedulers.context.INPUTS`, and its `step` takes `context`.
    """

    config: Any  # diffusers': a dict whose keys are attributes too
    num_inference_steps: Any  # T, an int once a run has begun
    timesteps: Any  # int64 (T,), and more for a loop

    @property
    def needs_quality(self) -> bool:
        """Does `step` want `quality`?"""

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run, or a block of it."""

    def step(
        self,
        model_output: Logits,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: Generators = None,
    ) -> Any:
        """Change a canvas (B, L) by one forward pass on it. The output has the fields of `PrismSchedulerOutput`."""
