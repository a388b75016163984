"""KV-cached forward passes: compute only active rows, and only the positions whose keys and values are not cached.

The cache holds keys and values at every column of the canvas. A forward pass computes some columns, replaces their keys
and values, and reads those of all other columns. Which columns it computes is the plan of the cache mode:

* Block-causal models: a finished block never changes, nor do its keys and values. So a forward pass computes the
  current block, and the blocks that were finished since the last one. This is exact.
* Bidirectional models: every key depends on every token. All columns are computed at the start of each block and every
  `cache_refresh_interval` steps. Other steps compute the block and everything after it ("prefix") or the block alone
  ("block"); all other columns keep the values of the last full forward pass. This is the approximation of Fast-dLLM
  (arXiv 2505.22618).

A shifted model reads the logits of a token one column earlier, so that column is computed too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..models.denoiser import CachedPass, MaskedDenoiser, token_positions
from ..models.families import FAMILIES, MDMSpec
from ..models.quality_head import QualityHead
from ..schedulers.validation import is_int

CACHES = ("none", "prefix", "block")


def check_cache(
    cache: str, refresh_interval: int | None, denoiser: MaskedDenoiser, quality_head: QualityHead | None
) -> None:
    """Raise a ValueError that names the argument if the model or the head cannot run with this cache.

    Args:
        cache: one of `CACHES`.
        refresh_interval: `cache_refresh_interval`, at least 1; None for full forward passes only at the start of a
            block.
        denoiser: the model.
        quality_head: the head in use, or None.
    """
    if cache not in CACHES:
        raise ValueError(f"`cache` must be one of {CACHES}, got {cache!r}.")
    if refresh_interval is not None and not is_int(refresh_interval, 1):
        raise ValueError(
            f"`cache_refresh_interval` must be None or an integer of at least 1, got {refresh_interval!r}."
        )
    if cache == "none":
        if refresh_interval is not None:
            raise ValueError('`cache_refresh_interval` has no effect with cache="none". Pass "prefix" or "block" too.')
        return
    if not has_cache(denoiser):
        able = sorted(name for name, spec in FAMILIES.items() if spec.mask_format == "additive")
        raise ValueError(
            f"`cache` is {cache!r}, but {type(denoiser.model).__name__} has no KV cache (past_key_values). "
            f'Pass cache="none". Families with a KV cache: {", ".join(able)}.'
        )
    if quality_head is not None and quality_head.attends:
        architecture = quality_head.config["architecture"]
        raise ValueError(
            f"`cache` is {cache!r}, but this quality head attends to every position (architecture "
            f"{architecture!r}), and with a cache most positions are not computed. "
            'Pass cache="none", or use a "linear" or "mlp" head.'
        )


def has_cache(denoiser: MaskedDenoiser) -> bool:
    """Does the model's forward take `past_key_values` and an additive mask?"""
    model = getattr(denoiser.model, "_orig_mod", denoiser.model)  # of torch.compile(model)
    takes = inspect.signature(model.forward).parameters
    return denoiser.spec.mask_format == "additive" and "past_key_values" in takes


# --- parts of a canvas, and keys and values at all of it --------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The rows and columns of a canvas (B, L) that a forward pass computes.

    Args:
        rows: int64 (A,); None for all.
        columns: int64 (A, W); a row with fewer than W columns is padded with the number L. None for all.
        reach: keys are read in the first `reach` columns; None for all.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    reach: int | None = None

    @classmethod
    def of(cls, wanted: Tensor, reach: int | None = None) -> Selection:
        """The columns of a bool (B, L) mask. A `reach` of None ends at the last of them. Waits for the device."""
        length = wanted.shape[1]
        numbers = torch.arange(length, device=wanted.device)
        columns = torch.where(wanted, numbers, length).sort(-1).values
        if reach is None:
            reach = int(torch.where(wanted, numbers, -1).max()) + 1
        return cls(None, columns[:, : int(wanted.sum(-1).max())], reach)

    def only(self, rows: Tensor | None) -> Selection:
        """This selection, made for all rows, for some `rows` alone, int64 (A,); None for all."""
        columns = self.columns if self.columns is None or rows is None else self.columns[rows]
        return Selection(rows, columns, self.reach)

    def take(self, values: Tensor) -> Tensor:
        """The selected part of `values` (B, L, ...), as (A, W, ...). It means nothing at the padding of a row."""
        values = values if self.rows is None else values[self.rows]
        if self.columns is None:
            return values
        every = torch.arange(len(values), device=values.device)[:, None]
        return values[every, self.columns.clamp(max=values.shape[1] - 1)]

    def put(self, canvas: Tensor, values: Tensor) -> None:
        """Write `values` (A, W, ...) into `canvas` (B, L + 1, ...). The last column takes the padding of short rows."""
        rows = None if self.rows is None else self.rows.to(canvas.device)
        if self.columns is None:
            canvas[slice(None) if rows is None else rows, :-1] = values
        else:
            rows = torch.arange(len(canvas), device=canvas.device) if rows is None else rows
            canvas[rows[:, None], self.columns.to(canvas.device)] = values


@dataclass
class Target:
    """What all layers of a cache share: the shape (B, L) of the canvas, and the part that a forward pass computes."""

    shape: tuple[int, ...] = (0, 0)
    selection: Selection = Selection()


class ColumnLayer(DynamicLayer):
    """Keys and values of one layer at all columns of a canvas, (B, heads, L + 1, D).

    Args:
        target: set before each forward pass.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all columns, as zeros: attention would pass on a NaN even from a masked column."""
        batch, length = self.target.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(batch, states.shape[1], length + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the states (A, heads, W, D) of a selection; return those of all columns in reach, (A, heads, K, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None  # since they are initialized
        return self._exchange(self.keys, key_states), self._exchange(self.values, value_states)

    def _exchange(self, store: Tensor, states: Tensor) -> Tensor:
        selection = self.target.selection
        selection.put(store.transpose(1, 2), states.transpose(1, 2))
        if selection.columns is None:
            return states
        within = store[:, :, : selection.reach]
        return within if selection.rows is None else within[selection.rows.to(store.device)]


# --- plans: which columns the next forward pass computes --------------------------------------------------------------


class NoCachePlan:
    """Every forward pass computes all columns."""

    def begin(self, sample: Tensor, block_mask: Tensor) -> None:
        """Begin a block; arguments as `CachedForward.begin`."""

    def forget(self) -> None:
        """Drop what is cached, because the canvas was changed from outside."""

    def next(self, rows: Tensor | None) -> Selection:
        """The part of the canvas that the next forward pass computes, for some rows, int64 (A,), or None for all."""
        return Selection(rows)


class BidirectionalPlan:
    """All columns at the start of a block and every `refresh_interval` steps. In other steps the block alone; with
    "prefix" also all columns after the block.

    Args:
        cache: "prefix" or "block".
        spec: facts about the model.
        attention_mask: of the canvas, (B, L); None without padding.
        refresh_interval: steps from one full forward pass to the next; None for one at the start of each block.
    """

    def __init__(self, cache: str, spec: MDMSpec, attention_mask: Tensor | None, refresh_interval: int | None) -> None:
        self.cache, self.spec, self.attention_mask = cache, spec, attention_mask
        self.refresh_interval = refresh_interval
        self._age = 0  # steps since the last full forward pass; 0 if one is due
        self._block = Selection()

    def begin(self, sample: Tensor, block_mask: Tensor) -> None:
        """A new block."""
        wanted = block_mask.cumsum(-1) > 0 if self.cache == "prefix" else block_mask
        self._block = Selection.of(with_read_columns(wanted, self.attention_mask, self.spec), sample.shape[1])
        self._age = 0

    def forget(self) -> None:
        """Everything is computed in the next step."""
        self._age = 0

    def next(self, rows: Tensor | None) -> Selection:
        """All columns if a full forward pass is due, else those of the block."""
        selection = Selection() if self._age == 0 else self._block
        self._age = 0 if self._age + 1 == self.refresh_interval else self._age + 1
        return selection.only(rows)


class BlockCausalPlan:
    """The current block. In its first step also the blocks that were finished since they were last computed.

    Columns are counted in the model's own blocks. A block of the run may hold several of these, or a part of one.

    Args:
        spec, attention_mask: as `BidirectionalPlan`.
        refresh_interval: steps from one full forward pass to the next; None for no full ones.
    """

    _stored: Tensor  # how many blocks of each row are cached and final, int64 (B,)
    _first: Tensor  # the block at which the current work begins, int64 (B,)
    _block_of: Tensor  # block of each column, int64 (B, L)
    _due: Tensor  # columns up to the end of the current block, bool (B, L)
    _block: Selection

    def __init__(self, spec: MDMSpec, attention_mask: Tensor | None, refresh_interval: int | None) -> None:
        self.spec, self.attention_mask, self.refresh_interval = spec, attention_mask, refresh_interval
        self._age = 0  # steps since `_stored` was brought up to date; 0 if that is due
        self._stored = torch.zeros((), dtype=torch.long)

    def begin(self, sample: Tensor, block_mask: Tensor) -> None:
        """A new block."""
        self._age = 0
        self._stored = self._stored.to(sample.device).expand(len(sample))
        assert self.spec.block_length is not None  # of a block-causal model
        self._block_of = token_positions(sample, self.attention_mask) // self.spec.block_length
        first = self._block_of.masked_fill(~block_mask, sample.shape[1]).amin(-1)
        last = self._block_of.masked_fill(~block_mask, -1).amax(-1, keepdim=True)
        self._first = torch.where(block_mask.any(-1), first, self._stored)
        self._due = self._block_of <= last
        self._block = self._from(self._first)

    def forget(self) -> None:
        """Compute all blocks again in the next step."""
        self._age, self._stored = 0, torch.zeros_like(self._stored)

    def next(self, rows: Tensor | None) -> Selection:
        """The current block; in its first step also newly finished blocks, at a refresh all blocks before it."""
        selection = self._block
        if self._age == 0:
            start = self._stored if self.refresh_interval is None else torch.zeros_like(self._stored)
            selection = self._from(torch.minimum(start, self._first))
            self._stored = self._first if rows is None else self._stored.index_copy(0, rows, self._first[rows])
        self._age = 0 if self._age + 1 == self.refresh_interval else self._age + 1
        return selection.only(rows)

    def _from(self, start: Tensor) -> Selection:
        """Columns from each row's block `start`, (B,), to the end of the current block."""
        wanted = self._due & (self._block_of >= start[:, None])
        return Selection.of(with_read_columns(wanted, self.attention_mask, self.spec))


def with_read_columns(wanted: Tensor, attention_mask: Tensor | None, spec: MDMSpec) -> Tensor:
    """`wanted`, bool (B, L), without padding; for a shifted model, also the column before each wanted one."""
    if attention_mask is not None:
        wanted = wanted & attention_mask.bool()
    return wanted | torch.nn.functional.pad(wanted[:, 1:], (0, 1)) if spec.logit_shift else wanted


def plan_of(
    cache: str, spec: MDMSpec, attention_mask: Tensor | None, refresh_interval: int | None
) -> NoCachePlan | BidirectionalPlan | BlockCausalPlan:
    """The plan of a cache mode for a model."""
    if cache == "none":
        return NoCachePlan()
    if spec.attention == "block_causal":
        return BlockCausalPlan(spec, attention_mask, refresh_interval)
    return BidirectionalPlan(cache, spec, attention_mask, refresh_interval)


# --- forward passes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardOutput:
    """Hidden states after one forward pass.

    Args:
        canvas: inputs of the output head, (B, L, H). They are up to date where tokens may be written. Elsewhere they
            may come from an earlier forward pass.
        fresh: the states that this forward pass computed, (A, W, H).
        selection: rows and columns of `fresh`.
    """

    canvas: Tensor
    fresh: Tensor
    selection: Selection

    def spread(self, values: Tensor, before: Tensor | None) -> Tensor:
        """A new (B, L) tensor: `values` (A, W), one for each state of `fresh`, and elsewhere `before` (B, L) or 0."""
        if self.selection.rows is None and self.selection.columns is None:
            return values
        batch, length = self.canvas.shape[:2]
        wide = values.new_zeros(batch, length + 1)
        if before is not None:
            wide[:, :length] = before
        self.selection.put(wide, values)
        return wide[:, :length]


class CachedForward:
    """The denoiser on one canvas, block by block: `begin` a block, then call it in each step.

    Args:
        denoiser: the model.
        attention_mask: of the canvas, (B, L); None without padding.
        cache: one of `CACHES`; checked by `check_cache`.
        refresh_interval: steps from one full forward pass to the next; None for one at the start of each block.
    """

    def __init__(
        self,
        denoiser: MaskedDenoiser,
        attention_mask: Tensor | None,
        cache: str = "none",
        refresh_interval: int | None = None,
    ) -> None:
        self.denoiser, self.attention_mask = denoiser, attention_mask
        self._plan = plan_of(cache, denoiser.spec, attention_mask, refresh_interval)
        self._target, self._cache = Target(), None
        if cache != "none":
            layer = partial(ColumnLayer, self._target)
            self._cache = Cache(layer_class_to_replicate=layer)  # type: ignore[arg-type]  # it is called, and no more
        self._buffer: Tensor | None = None  # (B, L + 1, H)

    def begin(self, sample: Tensor, block_mask: Tensor) -> None:
        """Begin a block, for which cached values may have to be computed again.

        Args:
            sample: the canvas, int64 (B, L).
            block_mask: positions of the block, bool (B, L); all false in rows that do not take part in it.
        """
        self._plan.begin(sample, block_mask)

    def forget(self) -> None:
        """Drop what is cached, because the canvas was changed from outside."""
        self._plan.forget()

    def __call__(self, sample: Tensor, taking_part: list[bool]) -> ForwardOutput:
        """One forward pass on the rows of `sample`, int64 (B, L), that take part."""
        rows = None
        if not all(taking_part):
            rows = torch.tensor([i for i, part in enumerate(taking_part) if part], device=sample.device)
        selection = self._plan.next(rows)
        self._target.shape, self._target.selection = sample.shape, selection
        ids = sample if rows is None else sample[rows]
        mask = self.attention_mask if rows is None or self.attention_mask is None else self.attention_mask[rows]
        columns = selection.columns
        hidden = self.denoiser.hidden(ids, mask, CachedPass(self._cache, columns, selection.reach))
        if rows is None and columns is None:
            return ForwardOutput(hidden, hidden, selection)
        batch, length = sample.shape
        if self._buffer is None:
            self._buffer = hidden.new_zeros(batch, length + 1, hidden.shape[-1])
        selection.put(self._buffer, hidden)
        if columns is not None and self.denoiser.spec.logit_shift and self.attention_mask is not None:
            # As in `MaskedDenoiser.hidden`: nothing stands before the first token of a row, so it reads its own column.
            every, first = torch.arange(batch, device=sample.device), self.attention_mask.long().argmax(-1)
            self._buffer[every, (first - 1).clamp(min=0)] = self._buffer[every, first]
        return ForwardOutput(self._buffer[:, :length], hidden, selection)
