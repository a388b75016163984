"""The facts about one masked diffusion model: what inference needs, and how its checkpoint is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..schedulers.validation import is_int

ATTENTION_KINDS = ("bidirectional", "block_causal")
MASK_FORMATS = ("padding", "additive", "none")
EXTRA_INPUTS = ("position_ids", "offset_position_ids", "timesteps")


@dataclass(frozen=True)
class CheckpointRecipe:
    """How a published checkpoint is read into a class of transformers. It is never saved with a pipeline.

    Args:
        native_class: class of transformers that loads the checkpoint without remote code. None for the class that the
            checkpoint's own config names, which needs `trust_remote_code=True` if transformers does not have it.
        key_mapping: new names of the checkpoint's weights, regular expression -> replacement, for
            `from_pretrained(key_mapping=...)`; or None.
        split_weights: for layers that were saved as one weight: end of its name after `key_mapping` -> ends of the
            names of the native weights that get its rows, in order; or None.
        config_mapping: field of the native config -> field of the checkpoint's config; None if the names are the same.
        config_values: further fields of the native config, which the checkpoint's config does not have; or None.
        hardcoded_config: field of the checkpoint's config -> the values that the native class can run. A checkpoint
            with another value is refused. A field that is absent is fine.
        vocab_key: name of a weight whose number of rows replaces a wrong vocab_size in the config. If the weight is
            absent, "lm_head.weight" is read, because the two are tied. None trusts the config.
        fold_time: the layers depend on an embedding of the diffusion time, which is always 0 (MDLM). It is folded into
            the weights, see `convert_mdlm.py`.
        tokenizer_class: class of transformers that loads the tokenizer without remote code; None for `AutoTokenizer`.
        tokenizer_repo: Hub id of the tokenizer, where the checkpoints have none of their own.
        tested: False if no test compares this family with an independent reference. Then loading it gives a warning.
    """

    native_class: str | None = None
    key_mapping: dict[str, str] | None = None
    split_weights: dict[str, list[str]] | None = None
    config_mapping: dict[str, str] | None = None
    config_values: dict[str, Any] | None = None
    hardcoded_config: dict[str, tuple[Any, ...]] | None = None
    vocab_key: str | None = None
    fold_time: bool = False
    tokenizer_class: str | None = None
    tokenizer_repo: str | None = None
    tested: bool = True


@dataclass(frozen=True)
class MDMSpec:
    """What inference needs to know about one masked diffusion model. Only the mask id has no default.

    Args:
        mask_token_id: id of the mask token, int in [0, vocab_size).
        attention: "bidirectional", or "block_causal" (blocks of `block_length` tokens, causal between blocks).
        logit_shift: 0, or 1 for models made from an autoregressive one, whose logits at i - 1 predict token i. It moves
            logits only, never hidden states.
        block_length: tokens in a block of a block-causal model, else None.
        mask_format: what the model's forward takes as `attention_mask`. "padding" is 0/1 of shape (B, L). "additive" is
            float (B, 1, L, L), which also makes a causal class bidirectional. "none" means that it takes no mask.
        extra_inputs: further arguments of the forward, made here: "position_ids" (0, 1, ... from the first token that
            is not padding), "offset_position_ids" (the same from config.pad_token_id + 1, as RoBERTa counts) and
            "timesteps" (zeros (B,)).
        output_head: dotted name of the output head inside the model; None asks `get_output_embeddings()`.
        output_bias: dotted name of a bias (V,) that the model adds after its output head, or None.
        logit_cap: the model ends with `cap * tanh(logits / cap)`, which its native class leaves out; None for no cap.
        lora_targets: names of the modules that LoRA adapts by default.
        no_content: tokens of the tokenizer, or their ids, that sampling never writes unless `allow_tokens` names them.
            The special tokens of the tokenizer need not be listed.
        family: key of the row of `FAMILIES` that these facts come from, by which the recipe is found again; or None.
        source: where these values come from.
        recipe: how the checkpoint is read, see `CheckpointRecipe`. It is not saved and takes no part in `==`. None for
            the recipe of `family`, or else for the class that the checkpoint's config names.
    Raises:
        ValueError: a value outside the sets above.
    """

    mask_token_id: int
    attention: str = "bidirectional"
    logit_shift: int = 0
    block_length: int | None = None
    mask_format: str = "padding"
    extra_inputs: tuple[str, ...] = ()
    output_head: str | None = None
    output_bias: str | None = None
    logit_cap: float | None = None
    lora_targets: tuple[str, ...] = ()
    no_content: tuple[str | int, ...] = ()
    family: str | None = None
    source: str = ""
    recipe: CheckpointRecipe | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not is_int(self.mask_token_id, 0):
            raise ValueError(f"`mask_token_id` must be a token id >= 0, got {self.mask_token_id!r}.")
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"`attention` must be one of {ATTENTION_KINDS}, got {self.attention!r}.")
        if self.mask_format not in MASK_FORMATS:
            raise ValueError(f"`mask_format` must be one of {MASK_FORMATS}, got {self.mask_format!r}.")
        if self.logit_shift not in (0, 1):
            raise ValueError(f"`logit_shift` must be 0 or 1, got {self.logit_shift!r}.")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ValueError(f"`logit_cap` must be None or above 0, got {self.logit_cap!r}.")
        if unknown := sorted(set(self.extra_inputs) - set(EXTRA_INPUTS)):
            raise ValueError(f"`extra_inputs` may hold {EXTRA_INPUTS}, got {unknown}.")
        if self.attention == "block_causal":
            if not is_int(self.block_length, 1):
                raise ValueError(
                    f"`block_length` of a block-causal model must be at least 1, got {self.block_length!r}."
                )
            if self.mask_format != "additive":
                raise ValueError(f'A block-causal model needs mask_format="additive", got {self.mask_format!r}.')
        elif self.block_length is not None:
            raise ValueError(f'`block_length` goes with attention="block_causal" only, got {self.block_length!r}.')
        # JSON gives lists back. A spec that is read from a file must equal the one that was written.
        for name in ("extra_inputs", "lora_targets", "no_content"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON, without the recipe. `MDMSpec.from_dict` reads it back to an equal spec."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "recipe"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MDMSpec:
        """The spec of a dict made by `to_dict`.

        Pipelines saved by older versions hold the fields of the recipe too.

        Raises:
            ValueError: unknown or missing fields, named.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"recipe"}
        of_recipe = {field.name for field in dataclasses.fields(CheckpointRecipe)}
        if unknown := sorted(set(values) - known - of_recipe):
            raise ValueError(f"`mdm_spec` has unknown fields {unknown}; known: {sorted(known)}.")
        if "mask_token_id" not in values:
            raise ValueError("`mdm_spec` needs `mask_token_id`.")
        read = {name: value for name, value in values.items() if name in of_recipe}
        recipe = CheckpointRecipe(**read) if read else None
        return cls(**{name: value for name, value in values.items() if name in known}, recipe=recipe)
