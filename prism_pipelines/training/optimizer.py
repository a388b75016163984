"""Muon for the matrices of a backbone and AdamW for everything else, as one optimizer that the Trainer can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on `matrices` and `torch.optim.AdamW` on `others`, stepped and saved together.

    Muon (Jordan et al. 2024) orthogonalises the momentum of 2-D weights; embeddings, output heads, norms and biases
    want AdamW. The two learning rates scale with one schedule. Norms and biases (1-D) are not decayed.

    Args:
        matrices: 2-D parameters for Muon.
        others: the remaining parameters.
        muon_lr: learning rate of Muon (0.02 is usual).
        lr: learning rate of AdamW.
        momentum: Muon's momentum.
        weight_decay: decoupled decay of both.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.ndim > 1]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.parts = {
            "muon": torch.optim.Muon(matrices, lr=muon_lr, momentum=momentum, weight_decay=weight_decay),
            "adamw": torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        }
        self.defaults = {}

    @property
    def param_groups(self) -> list[dict]:  # type: ignore[override]  # read from the parts
        """The groups of both parts; the dicts are shared, so a learning-rate schedule acts on them."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict:  # type: ignore[override]  # read from the parts
        """Per-parameter state of both parts, read only."""
        return {p: s for part in self.parts.values() for p, s in part.state.items()}

    def step(self, closure: Callable | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for part in self.parts.values():
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of both parts."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        """The state of both parts by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


def muon_adamw(objective: nn.Module, muon_lr: float, args: TrainingArguments) -> MuonAdamW:
    """`MuonAdamW` over the trainable parameters of an objective: Muon for the backbone's linear weights alone.

    Args:
        objective: of `losses`.
        muon_lr: learning rate of Muon.
        args: `TrainingArguments`, for the rest.
    Raises:
        ValueError: no matrix is trained.
    """
    denoiser: Any = objective.denoiser
    output_head = denoiser.model.get_output_embeddings()
    linear = [m for m in denoiser.model.modules() if isinstance(m, nn.Linear) and m is not output_head]
    matrices: Any = [m.weight for m in linear if m.weight.requires_grad]
    chosen = {id(p) for p in matrices}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in chosen]
    if not matrices:
        raise ValueError("`optimizer='muon'` needs trainable backbone matrices, and every one is frozen. Use 'adamw'.")
    return MuonAdamW(
        matrices,
        others,
        muon_lr=muon_lr,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
