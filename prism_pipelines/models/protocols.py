"""What this package needs of a tokenizer and of a backbone: what it calls of transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Tokenizer(Protocol):
    """A tokenizer as transformers has it; `PreTrainedTokenizerBase` is one.

    The name of the mask, unknown and end token, and their ids, are None where the tokenizer has none.
    """

    is_fast: bool
    chat_template: Any  # a template, or several by name
    all_special_ids: list[int]
    bos_token_id: int | None
    cls_token_id: int | None
    eos_token_id: int | None
    mask_token: str | None
    pad_token_id: int | None
    sep_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None

    def __len__(self) -> int:
        """The number of tokens, added ones included."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        """A mapping with `input_ids`, and `offset_mapping` if that is asked for."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        """The text of some ids, a list or a tensor of one dimension."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, as the vocabulary writes them."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Ids as the vocabulary writes them: a string for an int, a list for a list."""

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of tokens: an int for a string, a list for a list."""

    def get_vocab(self) -> Mapping[str, int]:
        """The id of each token."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **kwargs: Any) -> Any:
        """A chat as the template writes it: a string with `tokenize=False`."""


class Backbone(Protocol):
    """A model with an output head, as `MaskedDenoiser` wraps it; transformers' `PreTrainedModel` is one."""

    forward: Callable[..., Any]

    @property
    def config(self) -> Any:
        """Of transformers."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def __call__(self, *, input_ids: Tensor, return_dict: bool, **inputs: Any) -> Any:
        """One forward pass, in which the output head is called. What it returns is not read."""

    def get_output_embeddings(self) -> Any:
        """The output head; None if the model has none under this name."""

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its name."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its name."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules with their names."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with their names."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """All buffers with their names."""
