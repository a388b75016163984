"""Forward passes on a canvas that compute what they must: rows that still take part, and columns no cache holds.

The cache holds keys and values at every column of the canvas. A forward runs on some columns, its *window*, replaces
their keys and values, and reads those of all others.

* Block-causal models: a finished block never changes, nor do its keys and values, so the window is the block at work
  and what was finished since the last forward. This is exact.
* Bidirectional models: every key depends on every token. All columns are computed at the start of each block and every
  `cache_refresh_interval` steps; between, the window is the block and all after it ("prefix") or the block alone
  ("block"), and the rest is as old as the last full forward. This is the approximation of Fast-dLLM (arXiv 2505.22618).

A shifted model reads the token's logits at the column before, so the window has that column too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..models.denoiser import MaskedDenoiser, token_positions
from ..models.families import FAMILIES

CACHES = ("none", "prefix", "block")


def check_cache(cache: str, refresh_interval: int | None, denoiser: MaskedDenoiser, quality_head) -> None:
    """Raise a ValueError, naming the argument, for a cache that cannot be had.

    Args:
        cache: one of `CACHES`.
        refresh_interval: `cache_refresh_interval`, at least 1; None for at the start of a block alone.
        denoiser: of the model.
        quality_head: or None.
    """
    if cache not in CACHES:
        raise ValueError(f"`cache` must be one of {CACHES}, got {cache!r}.")
    if refresh_interval is not None:
        if isinstance(refresh_interval, bool) or not isinstance(refresh_interval, int) or refresh_interval < 1:
            raise ValueError(
                f"`cache_refresh_interval` must be None or an integer of at least 1, got {refresh_interval!r}."
            )
        if cache == "none":
            raise ValueError('`cache_refresh_interval` has no meaning with cache="none".')
    if cache == "none":
        return
    if not has_cache(denoiser):
        able = sorted(name for name, spec in FAMILIES.items() if spec.mask_format == "additive")
        raise ValueError(
            f"`cache` is {cache!r}, but {type(denoiser.model).__name__} keeps no keys and values. "
            f'Use cache="none"; families that have a cache: {", ".join(able)}.'
        )
    if quality_head is not None and quality_head.attends:
        raise ValueError(
            f"`cache` is {cache!r}, but this quality head attends to every position (architecture "
            f"{quality_head.config.architecture!r}), and a cache spares just those forwards. "
            'Use cache="none", or a "linear" or "mlp" head.'
        )


def has_cache(denoiser: MaskedDenoiser) -> bool:
    """Can the model give and take keys and values?"""
    model = getattr(denoiser.model, "_orig_mod", denoiser.model)  # of torch.compile(model)
    takes = inspect.signature(model.forward).parameters
    return denoiser.spec.mask_format == "additive" and "past_key_values" in takes


@dataclass
class Place:
    """Where in the store the keys and values of the forward at work belong.

    Args:
        batch, length: B and L of the canvas.
        rows: which rows take part, int64 (A,); None for all.
        columns: which columns, int64 (A, W), L (which the store has, but nobody reads) for none; None for all.
        reach: columns that the forward looks at, from the first.
    """

    batch: int
    length: int
    rows: Tensor | None = None
    columns: Tensor | None = None
    reach: int = 0


class ColumnLayer(DynamicLayer):
    """Keys and values of one layer at all columns of a canvas, (B, heads, L + 1, D).

    Args:
        place: shared by all layers; set before each forward.
    """

    def __init__(self, place: Place):
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for all columns. Zeros: what is not yet there is masked, but a NaN would come through."""
        batch, length = self.place.batch, self.place.length
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(batch, states.shape[1], length + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store the states (A, heads, W, D) of a window; return those of all columns in reach, (A, heads, K, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._exchange(self.keys, key_states), self._exchange(self.values, value_states)

    def _exchange(self, store: Tensor, states: Tensor) -> Tensor:
        place, device = self.place, store.device
        rows = None if place.rows is None else place.rows.to(device)
        if place.columns is None:
            store[slice(None) if rows is None else rows, :, : place.length] = states
            return states
        columns = place.columns.to(device)
        every = torch.arange(place.batch, device=device) if rows is None else rows
        store[every[:, None], :, columns] = states.transpose(1, 2)
        within = store[:, :, : place.reach]
        return within if rows is None else within[rows]


@dataclass(frozen=True)
class Window:
    """Columns that a forward runs on: int64 (B, W), L where a row has fewer; and how far keys are looked at."""

    columns: Tensor
    reach: int

    @classmethod
    def of(cls, wanted: Tensor, reach: int | None = None) -> Window:
        """The window of a bool (B, L) mask; `reach` None for up to the last wanted column. Waits for the device."""
        length = wanted.shape[1]
        numbers = torch.arange(length, device=wanted.device)
        columns = torch.where(wanted, numbers, length).sort(-1).values
        width = int(wanted.sum(-1).max())
        if reach is None:
            reach = int(torch.where(wanted, numbers, -1).max()) + 1
        return cls(columns[:, :width], reach)


@dataclass(frozen=True)
class ForwardOutput:
    """What one forward gives.

    Args:
        canvas: inputs of the output head, (B, L, H); right where tokens may be written, and elsewhere maybe old.
        fresh: those that were computed, (A, W, H).
        rows: of `fresh`, int64 (A,); None for all.
        columns: of `fresh`, int64 (A, W), L for none; None for all.
    """

    canvas: Tensor
    fresh: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """Of `values` (B, L, ...) those at the positions of `fresh`, (A, W, ...); at columns of none any will do."""
        values = values if self.rows is None else values[self.rows]
        if self.columns is None:
            return values
        every = torch.arange(len(values), device=values.device)[:, None]
        return values[every, self.columns.clamp(max=values.shape[1] - 1)]

    def spread(self, values: Tensor, before: Tensor | None) -> Tensor:
        """`values` (A, W), one for each of `fresh`, put into `before` (B, L) or zeros; a new tensor."""
        if self.rows is None and self.columns is None:
            return values
        batch, length = self.canvas.shape[:2]
        wide = values.new_zeros(batch, length + 1)
        if before is not None:
            wide[:, :length] = before
        return put(wide, self.rows, self.columns, values)[:, :length]


def put(canvas: Tensor, rows: Tensor | None, columns: Tensor | None, values: Tensor) -> Tensor:
    """Write `values` (A, W, ...) into `canvas` (B, L + 1, ...), at `rows` (A,) and `columns` (A, W), None for all."""
    every = torch.arange(len(canvas), device=canvas.device) if rows is None else rows
    if columns is None:
        canvas[every, :-1] = values
    else:
        canvas[every[:, None], columns] = values
    return canvas


class CachedForward:
    """The denoiser on one canvas, block by block: `begin` a block, then call it for each step.

    Args:
        denoiser: of the model.
        attention_mask: of the canvas, (B, L); None without padding.
        cache: one of `CACHES`; checked by `check_cache`.
        refresh_interval: steps of a block from one full forward to the next; None for one at its start alone.
    """

    def __init__(
        self,
        denoiser: MaskedDenoiser,
        attention_mask: Tensor | None,
        cache: str = "none",
        refresh_interval: int | None = None,
    ):
        self.denoiser, self.attention_mask = denoiser, attention_mask
        self.cache, self.refresh_interval = cache, refresh_interval
        self._causal = denoiser.spec.attention == "block_causal"
        self._buffer: Tensor | None = None  # (B, L + 1, H)
        self._place: Place | None = None
        self._states: Cache | None = None
        self._age = 0  # steps since everything was computed; 0 if that is due
        self._window: Window | None = None  # of steps that need not compute everything
        # Of block-causal models, in blocks of the model, int64 (B,): those stored and final, and where work begins.
        self._ready: Tensor | None = None
        self._first: Tensor | None = None
        self._due: Tensor | None = None  # columns up to the end of the block at work, bool (B, L)
        self._blocks: Tensor | None = None  # block of each column, int64 (B, L)

    def begin(self, sample: Tensor, block_mask: Tensor) -> None:
        """A new block: what was stored before may be out of date.

        Args:
            sample: the canvas, int64 (B, L).
            block_mask: positions of the block, bool (B, L); none in rows that do not take part in it.
        """
        self._age = 0
        if self.cache == "none":
            return
        if self._place is None:
            self._place = Place(*sample.shape)
            self._states = Cache(layer_class_to_replicate=partial(ColumnLayer, self._place))
            self._ready = torch.zeros(len(sample), dtype=torch.long, device=sample.device)
        if not self._causal:
            wanted = block_mask.cumsum(-1) > 0 if self.cache == "prefix" else block_mask
            self._window = self._to_window(wanted, sample.shape[1])
            return
        self._blocks = token_positions(sample, self.attention_mask) // self.denoiser.spec.block_length
        first = self._blocks.masked_fill(~block_mask, sample.shape[1]).amin(-1)
        last = self._blocks.masked_fill(~block_mask, -1).amax(-1, keepdim=True)
        self._first = torch.where(block_mask.any(-1), first, self._ready)
        self._due = self._blocks <= last
        self._window = self._from(self._first)

    def forget(self) -> None:
        """Somebody changed the canvas: nothing that is stored counts any more."""
        self._age = 0
        if self._ready is not None:
            self._ready = torch.zeros_like(self._ready)

    def __call__(self, sample: Tensor, taking_part: list[bool]) -> ForwardOutput:
        """One forward on `sample` (B, L), of the rows that take part."""
        rows = None
        if not all(taking_part):
            rows = torch.tensor([i for i, part in enumerate(taking_part) if part], device=sample.device)
        ids, mask = sample, self.attention_mask
        if rows is not None:
            ids, mask = ids[rows], None if mask is None else mask[rows]
        if self.cache == "none":
            return self._seen(sample, self.denoiser.hidden(ids, mask), rows, None)
        window = self._everything(rows) if self._age == 0 else self._window
        self._age = 0 if self._age + 1 == self.refresh_interval else self._age + 1
        columns = None if window is None else window.columns
        columns = columns if columns is None or rows is None else columns[rows]
        reach = sample.shape[1] if window is None else window.reach
        self._place.rows, self._place.columns, self._place.reach = rows, columns, reach
        hidden = self.denoiser.hidden(ids, mask, columns=columns, reach=reach, past_key_values=self._states)
        return self._seen(sample, hidden, rows, columns)

    def _seen(self, sample: Tensor, hidden: Tensor, rows: Tensor | None, columns: Tensor | None) -> ForwardOutput:
        if rows is None and columns is None:
            return ForwardOutput(hidden, hidden, None, None)
        batch, length = sample.shape
        if self._buffer is None:
            self._buffer = hidden.new_zeros(batch, length + 1, hidden.shape[-1])
        put(self._buffer, rows, columns, hidden)
        if columns is not None and self.denoiser.spec.logit_shift and self.attention_mask is not None:
            # As `MaskedDenoiser.hidden` does: the first token of a row has nothing before it and keeps its own row.
            every, first = torch.arange(batch, device=sample.device), self.attention_mask.long().argmax(-1)
            self._buffer[every, (first - 1).clamp(min=0)] = self._buffer[every, first]
        return ForwardOutput(self._buffer[:, :length], hidden, rows, columns)

    # --- windows ------------------------------------------------------------------------------------------------------

    def _everything(self, rows: Tensor | None) -> Window | None:
        """What must be computed where nothing may be old; None for all columns.

        A block-causal model: what was finished since the last forward, and the block; or, by a refresh interval, all.
        """
        if not self._causal:
            return None
        start = self._ready if self.refresh_interval is None else torch.zeros_like(self._ready)
        window = self._from(torch.minimum(start, self._first))
        done = self._ready.clone()
        done[slice(None) if rows is None else rows] = self._first[slice(None) if rows is None else rows]
        self._ready = done
        return window

    def _from(self, start: Tensor) -> Window:
        """Block-causal: from each row's block `start` (B,) to the end of the block at work, and not beyond."""
        return self._to_window(self._due & (self._blocks >= start[:, None]), None)

    def _to_window(self, wanted: Tensor, reach: int | None) -> Window:
        """Without padding, and with the column before each if the model is shifted."""
        if self.attention_mask is not None:
            wanted = wanted & self.attention_mask.bool()
        if self.denoiser.spec.logit_shift:
            wanted = wanted | torch.nn.functional.pad(wanted[:, 1:], (0, 1))
        return Window.of(wanted, reach)
