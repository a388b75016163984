"""What a backbone needs to be called as a masked diffusion model: one row of data per family, no subclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ATTENTION_KINDS = ("bidirectional", "block_causal")
MASK_FORMATS = ("padding", "additive")


@dataclass(frozen=True)
class MDMSpec:
    """Facts about one masked diffusion model. Only the mask id has no default.

    Args:
        mask_token_id: id of the mask token, int in [0, vocab_size).
        attention: "bidirectional", or "block_causal" (blocks of `block_length`, causal between blocks).
        logit_shift: 0, or 1 for models made from an autoregressive one: logits at i - 1 predict token i.
            Moves logits only, never hidden states.
        block_length: block size in tokens of a block-causal model, else None.
        mask_format: "padding" (2-D 0/1 mask) or "additive" (float (B, 1, L, L)).
        extra_inputs: names of further inputs of the forward that are made from the ids ("timesteps", "position_ids").
        output_head: dotted name of the output head inside the model; None asks `get_output_embeddings()`.
        native_class: transformers class that loads the checkpoint without remote code; None for `AutoModelForMaskedLM`.
        key_mapping: checkpoint key renaming for `from_pretrained(key_mapping=...)`, or None.
        lora_targets: module names that LoRA adapts by default.
        source: where these values come from.
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
    native_class: str | None = None
    key_mapping: dict[str, str] | None = None
    lora_targets: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self):
        if isinstance(self.mask_token_id, bool) or not isinstance(self.mask_token_id, int) or self.mask_token_id < 0:
            raise ValueError(f"`mask_token_id` must be a token id >= 0, got {self.mask_token_id!r}.")
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"`attention` must be one of {ATTENTION_KINDS}, got {self.attention!r}.")
        if self.mask_format not in MASK_FORMATS:
            raise ValueError(f"`mask_format` must be one of {MASK_FORMATS}, got {self.mask_format!r}.")
        if self.logit_shift not in (0, 1):
            raise ValueError(f"`logit_shift` must be 0 or 1, got {self.logit_shift!r}.")
        # JSON gives lists back; a spec read from a file must equal the one that was written.
        object.__setattr__(self, "extra_inputs", tuple(self.extra_inputs))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    def to_dict(self) -> dict:
        """A JSON-able dict; `MDMSpec.from_dict` reads it back to an equal spec."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, values: dict) -> MDMSpec:
        """The spec of a dict made by `to_dict`.

        Raises:
            ValueError: unknown or missing fields, named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"`mdm_spec` has unknown fields {unknown}; known: {sorted(known)}.")
        if "mask_token_id" not in values:
            raise ValueError("`mdm_spec` needs `mask_token_id`.")
        return cls(**values)


def _masked_lm(mask_token_id: int, native_class: str, lora_targets: tuple[str, ...], source: str) -> MDMSpec:
    return MDMSpec(mask_token_id, native_class=native_class, lora_targets=lora_targets, source=source)


# Keyed by `config.model_type`. The mask id of a row is that of the original checkpoints; a tokenizer overrides it.
FAMILIES: dict[str, MDMSpec] = {
    "bert": _masked_lm(103, "BertForMaskedLM", ("query", "key", "value"), "bert-base-uncased vocab.txt: [MASK]"),
    "roberta": _masked_lm(50264, "RobertaForMaskedLM", ("query", "key", "value"), "roberta-base vocab.json: <mask>"),
    "roberta-prelayernorm": _masked_lm(
        50264, "RobertaPreLayerNormForMaskedLM", ("query", "key", "value"), "efficient_mlm: RoBERTa's vocabulary"
    ),
    "modernbert": _masked_lm(50284, "ModernBertForMaskedLM", ("Wqkv", "Wo"), "ModernBERT-base tokenizer: [MASK]"),
}


def resolve_spec(config=None, tokenizer=None, *, mdm_spec=None, mask_token_id=None, name=None) -> MDMSpec:
    """The spec of a model, from the most explicit source that knows it.

    Order for the mask id: `mask_token_id`, `mdm_spec`, `config.mask_token_id`, `tokenizer.mask_token_id`, the row of
    `config.model_type` in `FAMILIES`. Everything else comes from `mdm_spec`, else from that row.

    Args:
        config: transformers config of the backbone, or None.
        tokenizer: transformers tokenizer, or None.
        mdm_spec: `MDMSpec` or the dict of one; taken as it is.
        mask_token_id: overrides the mask id alone.
        name: what the model is called in messages.
    Returns:
        An `MDMSpec`.
    Raises:
        ValueError: the family or the mask id is not known and was not passed; or the id is outside the vocabulary.
    """
    model_type = getattr(config, "model_type", None)
    name = name or getattr(config, "_name_or_path", "") or model_type or "the model"
    if isinstance(mdm_spec, dict):
        mdm_spec = MDMSpec.from_dict(mdm_spec)
    if mdm_spec is None:
        row = FAMILIES.get(model_type)
        ids = [getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)]
        ids.append(row.mask_token_id if row else None)
        found = next((i for i in [mask_token_id, *ids] if i is not None), None)
        if found is None:
            raise ValueError(
                f"No mask token is known for {name!r}: config.mask_token_id and tokenizer.mask_token_id are unset, "
                f"and model_type {model_type!r} is not in FAMILIES. Pass mask_token_id=<id> or mdm_spec=MDMSpec(...); "
                f"known: {', '.join(sorted(FAMILIES))}."
            )
        mdm_spec = dataclasses.replace(row, mask_token_id=found) if row else MDMSpec(found, source="mask id only")
    elif mask_token_id is not None:
        mdm_spec = dataclasses.replace(mdm_spec, mask_token_id=mask_token_id)
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None and mdm_spec.mask_token_id >= vocab_size:
        raise ValueError(
            f"`mask_token_id` of {name!r} is {mdm_spec.mask_token_id}, outside its vocabulary of {vocab_size} ids. "
            "Pass the right id, or resize the model's embeddings."
        )
    return mdm_spec
