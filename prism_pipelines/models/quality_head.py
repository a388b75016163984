"""The head that predicts from a backbone's last hidden states which visible tokens are right."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # `diffusers` itself shows type checkers a stand-in
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from ..schedulers.context import RunContext, check_inputs, context_features, num_features
from ..schedulers.validation import is_int, is_number, require

ARCHITECTURES = ("linear", "mlp", "block", "block_mlp")
# Inputs that are as wide as the hidden states, each with the name of the layer that reads it.
VECTORS = {"first_hidden": "first_in", "token": "token_in"}


class TransformerBlock(nn.Module):
    """One bidirectional pre-norm transformer block: attention, then a GELU network of four times the width.

    It has no position encoding, because the hidden states of a backbone hold their positions already.

    Args:
        hidden_size: H.
        num_heads: attention heads; divides H.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp_in = nn.Linear(hidden_size, 4 * hidden_size)
        self.mlp_out = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L, H) to (B, L, H); positions with `attention_mask` 0 are not attended to."""
        batch, length, width = hidden.shape
        heads = self.query_key_value(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, L, H / heads)
        allowed = None
        if attention_mask is not None:
            allowed = attention_mask.bool()
            # A row of padding alone attends to all of itself: some kernels give NaN for a softmax over nothing.
            allowed = (allowed | ~allowed.any(-1, keepdim=True))[:, None, None, :]
        attended = scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(hidden))))


class QualityHead(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both declare a config_name
    """Quality of each visible token, `p(x_i = y_i | all other tokens)`, as a logit.

    Parameters stay float32, whatever dtype the head is cast to or loaded in. The head is small, and it ranks tokens
    whose qualities differ by less than bfloat16 can represent. Moves between devices work as usual.

    With `context` the head also reads the run context of each token, see `RunContext`. One linear map adds the channels
    of `context_features` to the hidden states, and another adds them to the logit. For "first_hidden" and "token", maps
    of their own add `first_hidden` and `token_rows`, normalised, to the hidden states. All start at zero: a new head
    ignores its context.

    Args:
        hidden_size: H of the backbone's last hidden states.
        architecture: "linear" (LayerNorm, Linear), "mlp" (LayerNorm, Linear, GELU, Linear), "block" (one bidirectional
            transformer block, then "linear") or "block_mlp" (such a block, then "mlp").
        base_model: Hub id of the backbone that it was trained on, by which a shared head finds its backbone; or None.
        base_revision: revision of that backbone, or None.
        mdm_spec: `MDMSpec.to_dict()` of that backbone, or None.
        num_attention_heads: of "block" and "block_mlp"; None for as many as are at least 64 wide.
        base_fingerprint: `embedding_fingerprint` of that backbone, or None. A model with another one is refused.
        weights_fingerprint: `weights_fingerprint` of that backbone, or None. A model with another one gives a warning.
        signs_fingerprint: `signs_fingerprint` of that backbone, or None; it is the same in every float dtype.
        context: which of `schedulers.context.INPUTS` it reads besides the hidden states; none for PRISM's head.
        temperature: `quality` divides the logits by this before the sigmoid. Fit it on finished runs, see
            `evaluation.fit_temperature`. None for no division.
    Raises:
        ValueError: unknown architecture or input; a size below 1; attention heads whose number does not divide
            `hidden_size`; or a temperature that is not above 0.
        TypeError: `mdm_spec` is not a dict; the config is JSON.
    Source: PRISM (arXiv 2510.01384); "linear" is its head for Sudoku, "block" for text, "mlp" for LLaDA-8B. The
        context is ours.
    """

    config: Any  # diffusers declares a dict; it is a FrozenDict with attributes

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        architecture: str = "linear",
        base_model: str | None = None,
        base_revision: str | None = None,
        mdm_spec: dict | None = None,
        num_attention_heads: int | None = None,
        base_fingerprint: str | None = None,
        weights_fingerprint: str | None = None,
        context: tuple[str, ...] | list[str] = (),
        temperature: float | None = None,
        signs_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        require(is_int(hidden_size, 1), "hidden_size", hidden_size, "an integer of at least 1")
        heads = num_attention_heads
        require(heads is None or is_int(heads, 1), "num_attention_heads", heads, "None or at least 1")
        if architecture not in ARCHITECTURES:
            raise ValueError(f"`architecture` must be one of {ARCHITECTURES}, got {architecture!r}.")
        if mdm_spec is not None and not isinstance(mdm_spec, dict):
            raise TypeError(f"`mdm_spec` must be a dict (MDMSpec.to_dict()), got {type(mdm_spec).__name__}.")
        valid = temperature is None or (is_number(temperature, 0) and temperature > 0)
        require(valid, "temperature", temperature, "None or a number above 0")
        reads = check_inputs(context)
        if self.attends:
            widest = max(1, hidden_size // 64)
            heads = heads or next(n for n in range(widest, 0, -1) if hidden_size % n == 0)
            if hidden_size % heads:
                raise ValueError(f"`num_attention_heads` must divide hidden_size {hidden_size}, got {heads}.")
            self.block = TransformerBlock(hidden_size, heads)
        self.norm = nn.LayerNorm(hidden_size)
        if architecture.endswith("mlp"):
            self.inner = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)
        if count := num_features(reads):
            self.context_in = nn.Linear(count, hidden_size, bias=False)
            self.context_skip = nn.Linear(count, 1, bias=False)
        for name, layer in VECTORS.items():
            if name in reads:
                setattr(self, layer, nn.Linear(hidden_size, hidden_size, bias=False))
        for name in ("context_in", "context_skip", *VECTORS.values()):
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).weight)
        super()._apply(Tensor.float)  # torch.set_default_dtype may have made them in another dtype

    @property
    def attends(self) -> bool:
        """Does the head read other positions than the one that it judges?"""
        return self.config.architecture.startswith("block")

    @property
    def reads_context(self) -> tuple[str, ...]:
        """Names of the inputs from the run context, in the order of their channels."""
        return tuple(self.config.context)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        first_hidden: Tensor | None = None,
        token_rows: Tensor | None = None,
    ) -> Tensor:
        """Logits of the quality of every token.

        Args:
            hidden: last hidden states (the input of the output head), (B, L, H), any floating dtype.
            attention_mask: 1 for tokens and 0 for padding, (B, L); None for no padding. Only "block" and "block_mlp"
                read other positions, so only they use this.
            features: `context_features(context, sample, mask_token_id, head.reads_context)`, float (B, L, F). None is
                the same as zeros: nothing is known of the run.
            first_hidden: `context.first_hidden`, (B, L, H), any floating dtype; None or zeros where it is not known.
            token_rows: `context.token_rows`, likewise.
        Returns:
            float32 of shape (B, L), also under autocast; `quality` gives probabilities. Values at padding mean nothing.
        Raises:
            ValueError: the width of `hidden`, `features`, `first_hidden` or `token_rows` is not what this head reads.
        """
        vectors = {"first_hidden": first_hidden, "token": token_rows}
        self._check_widths((hidden, *vectors.values()), features)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, skip = hidden.float(), 0.0
            if features is not None and features.shape[-1]:
                hidden = hidden + self.context_in(features.float())
                skip = self.context_skip(features.float()).squeeze(-1)
            for name, states in vectors.items():
                if states is not None and name in self.reads_context:
                    # These maps are H by H, and states are known at some positions only; the others stay as they are.
                    index = states.any(-1).nonzero(as_tuple=True)
                    known = states[index].float()
                    added = getattr(self, VECTORS[name])(layer_norm(known, known.shape[-1:]))
                    hidden = hidden.index_put(index, hidden[index] + added)
            if self.attends:
                hidden = self.block(hidden, attention_mask)
            hidden = self.norm(hidden)
            if self.config.architecture.endswith("mlp"):
                hidden = gelu(self.inner(hidden))
            return self.out(hidden).squeeze(-1) + skip

    def quality(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        first_hidden: Tensor | None = None,
        token_rows: Tensor | None = None,
    ) -> Tensor:
        """P(token is right), float32 (B, L) in [0, 1]: the sigmoid of `forward` divided by `config.temperature`."""
        context = {"features": features, "first_hidden": first_hidden, "token_rows": token_rows}
        # A subclass that reads no context may take none.
        logits = self(hidden, attention_mask, **{name: value for name, value in context.items() if value is not None})
        return (logits if self.config.temperature is None else logits / self.config.temperature).sigmoid()

    def inputs(self, context: RunContext | None, sample: Tensor, mask_token_id: int) -> dict[str, Tensor | None]:
        """Arguments of `forward` and `quality` besides the hidden states, for a canvas `sample`, int64 (B, L)."""
        if context is None or not self.reads_context:
            return {}
        features = context_features(context, sample, mask_token_id, self.reads_context)
        return {"features": features, "first_hidden": context.first_hidden, "token_rows": context.token_rows}

    def _check_widths(self, vectors: tuple[Tensor | None, ...], features: Tensor | None) -> None:
        size, count = self.config.hidden_size, num_features(self.reads_context)
        for states in vectors:
            if states is not None and states.shape[-1] != size:
                raise ValueError(
                    f"This quality head reads hidden states of size {size}"
                    f"{f' (of {self.config.base_model})' if self.config.base_model else ''}, got {states.shape[-1]}. "
                    "Load the head that was trained for this backbone."
                )
        if features is not None and features.shape[-1] != count:
            raise ValueError(
                f"`features` must have {count} channels for context={self.reads_context}, got {features.shape[-1]}. "
                "Make them with context_features(context, sample, mask_token_id, head.reads_context)."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str] | None, **kwargs: Any) -> QualityHead:
        """As `ModelMixin.from_pretrained`, but always in float32, whatever `torch_dtype` or `dtype` says."""
        kwargs.pop("dtype", None)
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "torch_dtype": torch.float32})

    def to(self, *args: Any, **kwargs: Any) -> QualityHead:  # type: ignore[override]  # theirs is a wrapper object
        """As `nn.Module.to`, except that a dtype is ignored."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # as nn.Module.to reads its arguments
        if device is not None:
            super().to(device=device, non_blocking=non_blocking)  # type: ignore[call-arg]  # the same
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QualityHead:
        # .half(), .double(), .bfloat16() and a parent's .to() come through here. The device is taken, the dtype is not.
        def without_cast(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(without_cast, recurse)
