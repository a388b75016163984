"""Where the parts of a pipeline come from, and whether they fit together."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModelForMaskedLM, AutoTokenizer

from .denoiser import MaskedDenoiser
from .quality_head import QualityHead


def read_json(path: str, name: str, where: dict) -> dict | None:
    """A JSON file of a folder or Hub repository, or None if it has no such file."""
    if Path(path).is_dir():
        file = Path(path) / name
        return json.loads(file.read_text()) if file.is_file() else None
    try:
        return json.loads(Path(hf_hub_download(path, name, **where)).read_text())
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def load_plain(path: str, subfolder: str, dtype: torch.dtype, trust_remote_code: bool, where: dict) -> dict:
    """Model and tokenizer of a plain transformers repository; the tokenizer is None if it has none.

    Raises:
        OSError: not found, or weights that are not safetensors.
    """
    model = AutoModelForMaskedLM.from_pretrained(
        path, subfolder=subfolder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **where
    )
    has_tokenizer = any(
        read_json(path, f"{subfolder}/{name}".lstrip("/"), where) is not None
        for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")
    )
    if not has_tokenizer:
        return {"model": model, "tokenizer": None}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, trust_remote_code=trust_remote_code, **where)
    return {"model": model, "tokenizer": tokenizer}


def max_length(config) -> int | None:
    """The most tokens a model takes, or None if its config does not say.

    RoBERTa-like models count positions from pad_token_id + 1, so they take fewer than they have embeddings.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in config.model_type:
        limit -= (config.pad_token_id or 0) + 1
    return limit


def check_head(quality_head: QualityHead | None, model) -> None:
    """Raise a ValueError if a head was made for another hidden size than the model has."""
    if quality_head is None:
        return
    made_for, has = quality_head.config.hidden_size, model.config.hidden_size
    if made_for != has:
        base = quality_head.config.base_model
        raise ValueError(
            f"`quality_head` was made for hidden size {made_for}{f' ({base})' if base else ''}, and "
            f"{type(model).__name__} has {has}. Load the head of this model."
        )


@torch.no_grad()
def check_bidirectional(denoiser: MaskedDenoiser, name: str) -> None:
    """Raise a ValueError if the last token cannot influence the first position, as in a causal model.

    Two sequences that differ in their last token alone must differ in the hidden state of their first position.
    """
    device = denoiser.forbidden.device
    allowed = (~denoiser.forbidden).nonzero().flatten()
    first, other = int(allowed[0]), int(allowed[-1])
    mask = denoiser.spec.mask_token_id
    ids = torch.tensor([[mask, first, mask, first], [mask, first, mask, other]], device=device)
    hidden = denoiser.hidden(ids)[:, 0]
    if torch.equal(hidden[0], hidden[1]):
        raise ValueError(
            f"{name!r} is causal: its first position does not change with its last token, so it cannot fill masks from "
            "both sides. Load a bidirectional model."
        )
