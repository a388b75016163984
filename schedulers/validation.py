"""Checks of what users pass to schedulers; the errors say what is allowed."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, NamedTuple, TypeGuard, get_args, get_type_hints

import torch
from torch import Tensor

from .functional import ORDERS
from .token_sampling import Sampling

# The largest integer that a setting may be.
MOST = 2**31 - 1
# The most steps of one run. A larger number was meant as "no limit", and the run would never end.
MOST_STEPS = 1_000_000


def is_int(value: object, low: int, high: int = MOST) -> TypeGuard[int]:
    """Is `value` an integer (no bool) in [low, high]? By default `high` is `MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float, high: float = math.inf) -> bool:
    """Is `value` a finite number (no bool) in [low, high]?"""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and low <= value <= min(high, sys.float_info.max)


def require(valid: bool, name: str, value: object, allowed: str) -> None:
    """Unless `valid`, raise a ValueError that names the argument, its value and what is allowed."""
    if not valid:
        if isinstance(value, int) and value > MOST:
            allowed += f" and at most {MOST}"
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


# --- config fields say in their annotation what they may be -----------------------------------------------------------


class Allowed(NamedTuple):
    """What a config field may be: `words` for the error, and `fits`, a test of a value."""

    words: str
    fits: Callable[[Any], bool]


def integer(low: int, high: int = MOST) -> Allowed:
    """An integer from `low` to `high`."""
    words = f"an integer of at least {low}" if high == MOST else f"an integer from {low} to {high:,}"
    return Allowed(words, lambda value: is_int(value, low, high))


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Allowed:
    """A number from `low` to `high`; `above` excludes `low` itself, `below` excludes `high`."""

    def fits(value: Any) -> bool:
        return is_number(value, low, high) and not (above and value == low) and not (below and value == high)

    if math.isinf(high):
        return Allowed(f"a number {'above' if above else 'of at least'} {low}", fits)
    return Allowed(f"a number in {'(' if above else '['}{low}, {high}{')' if below else ']'}", fits)


def one_of(*values: str) -> Allowed:
    """One of some words."""
    return Allowed(f"one of {values}", lambda value: isinstance(value, str) and value in values)


Flag = Annotated[bool, Allowed("True or False", lambda value: isinstance(value, bool))]
Order = Annotated[str, one_of(*ORDERS)]
Temperature = Annotated[float, number(0)]
TopP = Annotated[float | None, number(0, 1, above=True)]
TopK = Annotated[int | None, integer(1)]
TokenId = Annotated[int | None, integer(0)]


def check(name: str, value: object, annotation: Any) -> None:
    """Raise a ValueError unless a value is what `Annotated[type, Allowed]` allows, or None where the type has it."""
    kind, allowed = get_args(annotation)
    optional = NoneType in get_args(kind)
    valid = (optional and value is None) or allowed.fits(value)
    require(valid, name, value, f"None or {allowed.words}" if optional else allowed.words)


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]  # of that class, on purpose
    return {name: hint for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def check_fields(kind: type, config: Mapping[str, Any]) -> None:
    """Raise a ValueError for a field of a config that is not what the signature of `kind` allows."""
    for name, annotation in _annotations(kind).items():
        check(name, config[name], annotation)


# --- fields of a scheduler in use -------------------------------------------------------------------------------------


def own_fields(scheduler: Any) -> dict[str, Any]:
    """The fields of a scheduler that its class takes; its config may hold others, kept from another class."""
    names = scheduler._get_init_keys(type(scheduler))
    return {name: value for name, value in scheduler.config.items() if name in names}


def loop_steps(scheduler: Any) -> int:
    """Forward passes that a scheduler's refinement loop adds to the steps of each block; 0 for one without a loop."""
    return own_fields(scheduler).get("loop_steps", 0)


# --- arguments of `set_timesteps` and `step` --------------------------------------------------------------------------


def check_run(num_inference_steps: int, block_length: int | None) -> None:
    """Raise a ValueError unless the arguments of `set_timesteps` are integers of at least 1, and not too many steps."""
    check("num_inference_steps", num_inference_steps, Annotated[int, integer(1, MOST_STEPS)])
    check("block_length", block_length, Annotated[int | None, integer(1)])


def resolve_sampling(
    config: Mapping[str, Any], temperature: float | None, top_p: float | None, top_k: int | None
) -> Sampling:
    """The sampling settings of one step: the arguments, or where they are None the config.

    Raises:
        ValueError: a value out of range.
    """
    temperature = config["temperature"] if temperature is None else temperature
    top_p = config["top_p"] if top_p is None else top_p
    top_k = config["top_k"] if top_k is None else top_k
    check("temperature", temperature, Temperature)
    check("top_p", top_p, TopP)
    check("top_k", top_k, TopK)
    return Sampling(temperature, top_p, top_k)


def check_timestep(timestep: int | Tensor, timesteps: Tensor | None) -> int:
    """The timestep as an int; a ValueError if it is not one of the run's, or if there is no run yet."""
    if timesteps is None:
        raise ValueError("There are no timesteps yet: call `set_timesteps(num_inference_steps)` before `step`.")
    index = int(timestep)
    require(0 <= index < len(timesteps), "timestep", index, f"one of `timesteps`, which are 0 to {len(timesteps) - 1}")
    return index


def check_sample(sample: Tensor, model_output: Any, generation_mask: Tensor | None) -> Tensor:
    """The generation mask, all true if it is None; a ValueError if one of the three has a wrong shape or dtype."""
    integers = sample.ndim == 2 and not (sample.is_floating_point() or sample.dtype == torch.bool)
    require(integers, "sample", described(sample), "token ids of shape (B, L)")
    if isinstance(model_output, Tensor):
        aligned = model_output.ndim == 3 and model_output.shape[:2] == sample.shape
        shape = tuple(model_output.shape)
        require(aligned, "model_output", shape, f"logits (B, L, V) with (B, L) = {tuple(sample.shape)}")
    if generation_mask is None:
        return torch.ones_like(sample, dtype=torch.bool)
    fits = generation_mask.dtype == torch.bool and generation_mask.shape == sample.shape
    wanted = f"torch.bool {tuple(sample.shape)}, as `sample`"
    require(fits, "generation_mask", described(generation_mask), wanted)
    return generation_mask


def check_mask_token(mask_token_id: Any) -> int:
    """The id of the mask token; a ValueError if there is none."""
    require(is_int(mask_token_id, 0), "mask_token_id", mask_token_id, "a token id, here or in the scheduler's config")
    return mask_token_id


def check_quality(quality: Tensor, sample: Tensor) -> None:
    """Raise a ValueError unless `quality` is a floating-point tensor with the shape of `sample`."""
    fits = quality.is_floating_point() and quality.shape == sample.shape
    require(fits, "quality", described(quality), f"floats of shape {tuple(sample.shape)}, as `sample`")


def described(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, for an error."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"
