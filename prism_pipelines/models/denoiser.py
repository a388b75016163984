"""The interface of every backbone: token ids -> the input of its output head -> logits at chosen positions.

The last hidden state is defined as the *input of the output head*. A forward-pre-hook of the head catches it, and gives
the head no rows. So a forward pass of the model costs its body alone, and logits are made later, only where they are
read.

Threads may share a model. The hidden state that a forward pass catches belongs to its thread. Forward passes of one
model wait for each other, because models keep state while they run (rotary tables, offloaded weights,
`config.is_causal`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..schedulers.token_sampling import chunk_rows
from .families import supports_all_masked_input
from .protocols import Backbone
from .spec import MDMSpec
from .transformers_patches import not_causal

# Autoregressive classes of transformers that are bidirectional without any mask if `is_causal` is False.
# tests/test_speed.py compares each with a mask of zeros.
UNMASKED = (
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)


_REGISTERING = threading.Lock()


class OutputHeadHook:
    """Forward-pre-hook of an output head. While `catching`, it keeps the head's input and gives the head no rows.

    There is one such hook for each head, and it stays there: `torch.compile` traces it with the model, and guards
    `catching`. The input is kept for the thread that runs the model. `lock` is held while the model or its head runs.
    """

    def __init__(self) -> None:
        self.mine, self.lock = threading.local(), threading.RLock()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not getattr(self.mine, "catching", False):
            return None
        self.mine.caught = args[0]
        return (args[0][:, :0], *args[1:])

    def __reduce__(self) -> tuple[type[OutputHeadHook], tuple[()]]:
        return (OutputHeadHook, ())  # a copy of the model is another model, with a lock of its own

    @contextmanager
    def catch(self) -> Iterator[threading.local]:
        """Inside it, a forward pass of this thread leaves the head's input in `caught`. Other threads wait."""
        with self.lock:
            try:
                self.mine.catching, self.mine.caught = True, None
                yield self.mine
            finally:
                self.mine.catching, self.mine.caught = False, None

    @classmethod
    def of(cls, head: nn.Module) -> OutputHeadHook:
        """The hook of `head`, which is registered if there is none yet."""
        with _REGISTERING:
            hook = next((hook for hook in head._forward_pre_hooks.values() if isinstance(hook, cls)), None)
            if hook is None:
                hook = cls()
                head.register_forward_pre_hook(hook)
        return hook


class CachedPass(NamedTuple):
    """A forward pass that reads and writes a cache of keys and values, on all positions or on some.

    Only for models with an additive mask, see `sampling/kv_cache.py`.

    Args:
        past_key_values: transformers cache; None for none, and then all positions are run.
        columns: run the model on these positions only, int64 (B, W), and read the keys and values of all others from
            the cache. A row with fewer than W is padded with the number L; the result there means nothing. None: all.
        reach: with `columns`, the number of positions, from the first, that have keys; None for L.
    """

    past_key_values: Any = None
    columns: Tensor | None = None
    reach: int | None = None


class MaskedDenoiser(nn.Module):
    """A masked language model as `ids -> hidden -> logits at positions`, with suppressed ids at -inf.

    Args:
        model: transformers model that has output embeddings, or another `Backbone`.
        spec: facts about it, see `MDMSpec`.
        num_tokens: ids of at least this are not in the tokenizer and are never predicted; None for no such ids.
        suppress_tokens: further ids that are never predicted (padding). The mask id need not be listed.
    Raises:
        ValueError: the model has no output head.
    """

    model: Backbone
    suppressed: Tensor
    suppressed_ids: Tensor

    def __init__(
        self, model: Backbone, spec: MDMSpec, num_tokens: int | None = None, suppress_tokens: Iterable[int] = ()
    ) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        if spec.output_head and spec.output_head not in dict(model.named_modules()):
            raise ValueError(f"`output_head` {spec.output_head!r} is no module of {type(model).__name__}.")
        head = self._output_head()
        vocab_size = getattr(head, "out_features", None) or head.weight.shape[0]
        suppressed = torch.zeros(vocab_size, dtype=torch.bool)
        suppressed[list({spec.mask_token_id, *suppress_tokens})] = True
        suppressed[vocab_size if num_tokens is None else num_tokens :] = True
        ids, device = suppressed.nonzero()[:, 0], head.weight.device
        if device.type == "meta":  # an offloaded weight, which is loaded where and when it is used
            device = suppressed.device
        self.register_buffer("suppressed", suppressed.to(device), persistent=False)  # (V,)
        self.register_buffer("suppressed_ids", ids.to(device), persistent=False)  # (a few,)

    def _output_head(self) -> Any:
        head = self.model.get_submodule(self.spec.output_head) if self.spec.output_head else None
        head = head or self.model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(self.model).__name__} has no output head (get_output_embeddings() is None). "
                "Load it with its language-model head, or name the head in MDMSpec(output_head=...)."
            )
        return head

    def output_parameters(self) -> list[nn.Parameter]:
        """Parameters that `logits` uses, and `hidden` does not unless they are tied to the embeddings."""
        bias = [self.model.get_parameter(self.spec.output_bias)] if self.spec.output_bias else []
        return [*self._output_head().parameters(), *bias]

    @property
    def lock(self) -> Any:
        """The `threading.RLock` that is held while a thread runs the model or its head."""
        return OutputHeadHook.of(self._output_head()).lock

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the output head."""
        return self.suppressed.shape[0]

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cached: CachedPass | None = None
    ) -> Tensor:
        """The input of the output head, by one forward pass of the model in which that head gets no rows.

        Args:
            input_ids: int64 of shape (B, L).
            attention_mask: 1 for tokens and 0 for padding, of shape (B, L); None for no padding.
            cached: the cache to use, and the positions to run the model on; None for no cache and all positions.
        Returns:
            (B, L, H), or (B, W, H) with `cached.columns`, in the model's dtype. It means nothing at padding.
        """
        past_key_values, columns, _ = cached or CachedPass()
        inputs = self.inputs(input_ids, attention_mask, cached)
        if past_key_values is not None:
            inputs |= {"past_key_values": past_key_values, "use_cache": True}
        asked = input_ids if columns is None else take_columns(input_ids, columns)
        with OutputHeadHook.of(self._output_head()).catch() as mine:
            with not_causal(self.model.config if "is_causal" in inputs else None):
                self.model(input_ids=asked, return_dict=True, **inputs)
            hidden = mine.caught.to(input_ids.device)  # from the last device of a model that is spread over several
        if self.spec.logit_shift and attention_mask is not None and columns is None:
            # For the first token of a row a shifted model reads the hidden state of that token, also after padding.
            shown = attention_mask.bool()
            before_first = ~shown[:, :-1] & shown[:, 1:] & (attention_mask.cumsum(-1)[:, 1:] == 1)
            front = torch.where(before_first[..., None], hidden[:, 1:], hidden[:, :-1])
            hidden = torch.cat([front, hidden[:, -1:]], dim=1)
        return hidden

    def inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cached: CachedPass | None = None
    ) -> dict[str, Any]:
        """Arguments of the model's forward besides the ids, as the spec says; arguments as `hidden`."""
        spec, inputs = self.spec, dict[str, Any]()
        _, columns, reach = cached or CachedPass()
        positions = token_positions(input_ids, attention_mask)
        if not supports_all_masked_input(getattr(self.model, "config", None)):
            hidden = input_ids == spec.mask_token_id
            if attention_mask is not None:
                hidden = hidden | (attention_mask == 0)
            if hidden.all(-1).any():
                raise ValueError(
                    "A row holds nothing but masks, and this model (ESM, token_dropout) divides by the share of other "
                    'tokens. Keep the tokens at its ends: infill="<cls><mask>...<mask><eos>" as ids or text.'
                )
        if spec.mask_format == "padding":
            inputs["attention_mask"] = attention_mask
        elif spec.mask_format == "additive" and attention_mask is None and self._sees_all_without_mask():
            inputs |= {"is_causal": False, "use_cache": False}
        elif spec.mask_format == "additive":
            block_length = spec.block_length if spec.attention == "block_causal" else None
            dtype = self._output_head().weight.dtype
            dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()  # a quantized head stores integers
            inputs["attention_mask"] = additive_mask(positions, attention_mask, block_length, dtype, columns, reach)
            inputs["use_cache"] = False
        elif attention_mask is not None:
            raise ValueError("This model takes no attention mask, so rows of a batch must have the same length.")
        if "position_ids" in spec.extra_inputs:
            inputs["position_ids"] = positions if columns is None else take_columns(positions, columns)
        if "offset_position_ids" in spec.extra_inputs:
            padding_place = self.model.config.pad_token_id
            inputs["position_ids"] = positions + padding_place + 1
            if attention_mask is not None:
                inputs["position_ids"] = inputs["position_ids"].masked_fill(attention_mask == 0, padding_place)
        if "timesteps" in spec.extra_inputs:
            inputs["timesteps"] = torch.zeros(len(input_ids), device=input_ids.device)
        return inputs

    def _sees_all_without_mask(self) -> bool:
        """May the mask of zeros be left out? Flash kernels take no mask."""
        model = getattr(self.model, "_orig_mod", self.model)  # of torch.compile(model)
        native = type(model).__module__.startswith("transformers.") and type(model).__name__ in UNMASKED
        return (
            native
            and self.spec.attention == "bidirectional"
            and model.config._attn_implementation == "sdpa"
            and set(getattr(model.config, "layer_types", None) or ()) <= {"full_attention"}
            and getattr(model.config, "sliding_window", None) is None
        )

    def lm_head(self, rows: Tensor) -> Tensor:
        """Logits (N, V) of hidden rows (N, H), with the mask token and undefined ids at -inf."""
        with self.lock:  # an offloaded head is unloaded again after each call
            logits = self._output_head()(rows).to(rows.device)
        if self.spec.output_bias:
            logits = logits + self.model.get_parameter(self.spec.output_bias)
        logits = soft_cap(logits, self.spec.logit_cap)
        ids = self.suppressed_ids.to(logits.device)  # they may be on the device of an offloaded head
        if logits.requires_grad:
            return logits.index_fill(-1, ids, -torch.inf)
        return logits.index_fill_(-1, ids, -torch.inf)  # a new tensor of the head, which needs no copy

    def token_logits(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """For each row, the logit of one token.

        With a plain linear output head that is one dot product each. Any other head computes all logits, some rows at
        a time.

        Args:
            rows: what the output head reads, (N, H).
            tokens: ids, int64 (N,).
        Returns:
            float32 (N,), -inf for tokens that are never predicted.
        """
        head = self._output_head()
        if type(head) is not nn.Linear or head.weight.is_meta or not head.weight.is_floating_point():
            parts = zip(*(values.split(chunk_rows(self.vocab_size)) for values in (rows, tokens)), strict=True)
            return torch.cat([self.lm_head(some).gather(-1, ids[:, None])[:, 0].float() for some, ids in parts])
        where = tokens.to(head.weight.device)
        logits = (rows.to(where.device).float() * head.weight[where].float()).sum(-1)
        bias = [head.bias] if head.bias is not None else []
        bias += [self.model.get_parameter(self.spec.output_bias)] if self.spec.output_bias else []
        for values in bias:
            logits = logits + values[where.to(values.device)].to(logits)
        logits = soft_cap(logits, self.spec.logit_cap)
        return logits.to(rows.device).masked_fill(self.suppressed.to(rows.device)[tokens], -torch.inf)

    def token_rows(self, sample: Tensor) -> Tensor:
        """The row of the output head's weight that belongs to each visible token.

        The logit of a token is the dot product of its row and the hidden state, so both have the same width in every
        model, which input embeddings need not have.

        Args:
            sample: token ids, int64 (B, L).
        Returns:
            (B, L, H) in the model's dtype; 0 at masks.
        Raises:
            ValueError: the output head is quantized, so it has no such rows.
        """
        head = self._output_head()
        if not head.weight.is_floating_point() or head.weight.itemsize == 1:
            raise ValueError(
                'A quality head that reads "token" needs the rows of the output head, and this one is quantized to '
                f"{head.weight.dtype}. Keep it in a float dtype: list it in `llm_int8_skip_modules`, for instance."
            )
        with self.lock, align_module_device(head):  # loads an offloaded weight
            rows = head.weight.detach()[sample.to(head.weight.device)].to(sample.device)
        return rows.masked_fill((sample == self.spec.mask_token_id)[..., None], 0)

    def aligned(self, hidden: Tensor) -> Tensor:
        """`hidden` (B, L, H), moved so that position i holds the state that predicts token i, as `logits` reads it."""
        # The first token of a shifted model has nothing before it, and keeps its own state.
        return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1) if self.spec.logit_shift else hidden

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits that predict the tokens at `positions`.

        Args:
            hidden: (B, L, H) from `hidden`.
            positions: bool of shape (B, L), N of them true.
        Returns:
            (N, V), in row-major order of `positions`, in the model's dtype.
        """
        return self.logits_at(hidden, *positions.nonzero(as_tuple=True))

    def logits_at(self, hidden: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """As `logits`, at positions given as rows and columns, int64 (N,) each."""
        # A shifted model predicts token i at i - 1. The first token has nothing before it, and keeps its own state.
        return self.lm_head(hidden[row, (column - self.spec.logit_shift).clamp(min=0)])


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`; None leaves the logits as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def token_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position of each token, counted from the first of its row that is not padding, int64 (B, L); 0 at padding."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).masked_fill(attention_mask == 0, 0)


def take_columns(values: Tensor, columns: Tensor) -> Tensor:
    """`values` (B, L) at `columns` (B, W). A column beyond the last gives the last."""
    return values.gather(1, columns.clamp(max=values.shape[1] - 1))


def additive_mask(
    positions: Tensor,
    attention_mask: Tensor | None,
    block_length: int | None,
    dtype: torch.dtype,
    columns: Tensor | None = None,
    reach: int | None = None,
) -> Tensor:
    """The attention mask that is added to scores: 0 where a token sees another, the lowest finite number elsewhere.

    Args:
        positions: position of each token in its row, int64 (B, L).
        attention_mask: 1 for tokens and 0 for padding, (B, L); None for no padding.
        block_length: None if every token sees all others. Else a token sees its own block and the blocks before it.
        dtype: of the result; the model's.
        columns: columns of the queries, int64 (B, Q); None for all.
        reach: number of keys, from the first; None for all.
    Returns:
        (B, 1, Q, K), query by key. Padding sees itself, because a softmax over nothing is NaN. No token sees padding.
    """
    batch, length = positions.shape
    every = torch.arange(length, device=positions.device)
    columns = every.expand(batch, -1) if columns is None else columns
    reach = length if reach is None else reach
    seen = torch.ones(batch, columns.shape[1], reach, dtype=torch.bool, device=positions.device)
    if block_length is not None:
        block = positions // block_length
        seen = block[:, None, :reach] <= take_columns(block, columns)[:, :, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, :reach]
        seen = seen | (columns[:, :, None] == every[:reach])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class LazyLogits:
    """Logits of one forward pass that are computed when they are indexed, and only at those positions.

    `lazy[positions]` with a boolean (B, L) mask gives (N, V), as a dense (B, L, V) tensor would.
    """

    def __init__(self, denoiser: MaskedDenoiser, hidden: Tensor) -> None:
        self.denoiser, self.hidden = denoiser, hidden

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.denoiser.logits(self.hidden, positions)

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Logits (N, V) that predict the tokens at rows and columns, int64 (N,) each. Does not wait for the device."""
        return self.denoiser.logits_at(self.hidden, row, column)

    @property
    def mask_token_id(self) -> int:
        """The mask token, whose logits are -inf already."""
        return self.denoiser.spec.mask_token_id

    @property
    def shape(self) -> torch.Size:
        """(B, L, V), the shape of the dense logits, which are never made."""
        return torch.Size((*self.hidden.shape[:2], self.denoiser.vocab_size))

    @property
    def device(self) -> torch.device:
        """Where the logits will be."""
        return self.hidden.device


class ProcessedLogits:
    """Logits that a function of the user changes as they are read. It cannot allow suppressed tokens.

    Args:
        logits: `LazyLogits` or `GuidedLogits` of a canvas.
        processor: called as `processor(positions, logits)` with the `Positions` of N rows of logits (N, V), float.
            Returns logits of that shape. Each step calls it for the positions that it reads, in one or several parts.
        sample: the canvas that the model saw, int64 (B, L).
    """

    def __init__(
        self,
        logits: LazyLogits | GuidedLogits,
        processor: Callable[[Positions, Tensor], Tensor],
        sample: Tensor,
    ) -> None:
        self.logits, self.processor, self.sample = logits, processor, sample
        self.shape, self.device, self.mask_token_id = logits.shape, logits.device, logits.mask_token_id

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.at(*positions.nonzero(as_tuple=True))

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """As `LazyLogits.at`.

        Raises:
            TypeError, ValueError: the processor returned no float tensor of the same shape, or NaN, or forbade every
                token at a masked position.
        """
        before = self.logits.at(row, column)
        after = self.processor(Positions(row, column, self.sample), before.clone())
        if not isinstance(after, Tensor) or not after.is_floating_point():
            got = after.dtype if isinstance(after, Tensor) else type(after).__name__
            raise TypeError(f"`logits_processor` must return a float tensor, got {got}.")
        if after.shape != before.shape:
            raise ValueError(
                f"`logits_processor` must return logits of shape {tuple(before.shape)}, got {tuple(after.shape)}."
            )
        after = after.to(before.device).masked_fill(before.isneginf(), -torch.inf)
        # Logits are also read at visible positions, where nothing is drawn. There all tokens may be forbidden.
        masked = self.sample[row, column] == self.mask_token_id
        wrong = after.isnan().any(-1) | (masked & after.isneginf().all(-1))
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            what = "NaN" if after[first].isnan().any() else "forbids every token"
            raise ValueError(
                f"`logits_processor` gives {what} in row {int(row[first])}, position {int(column[first])} of the "
                "canvas. Leave at least one token that the model may write."
            )
        return after


class Positions(NamedTuple):
    """The positions of the logits that a `logits_processor` gets.

    Args:
        row, column: of each position in the canvas, int64 (N,).
        sample: the canvas that the model saw, int64 (B, L): the tokens written so far, and masks.
    """

    row: Tensor
    column: Tensor
    sample: Tensor


class GuidedLogits:
    """Classifier-free guidance, computed when it is indexed: `u + (cfg_scale + 1) * (c - u)` of two `LazyLogits`.

    Args:
        conditional: logits c given the prompt.
        unconditional: logits u of the same canvas with the prompt masked.
        cfg_scale: strength; 0 gives c.
    Source: LLaDA (arXiv 2502.09992, appendix on classifier-free guidance).
    """

    def __init__(self, conditional: LazyLogits, unconditional: LazyLogits, cfg_scale: float) -> None:
        self.conditional, self.unconditional, self.cfg_scale = conditional, unconditional, cfg_scale
        self.shape, self.device = conditional.shape, conditional.device
        self.mask_token_id = conditional.mask_token_id

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self._guided(self.conditional[positions], self.unconditional[positions])

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """As `LazyLogits.at`."""
        return self._guided(self.conditional.at(row, column), self.unconditional.at(row, column))

    def _guided(self, given: Tensor, free: Tensor) -> Tensor:
        # Suppressed ids are -inf in both, and their difference would be NaN.
        return torch.where(given.isneginf(), given, free + (self.cfg_scale + 1) * (given - free))
