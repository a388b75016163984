"""What users pass to schedulers: checked where it enters, with errors that say what would be right."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping

import torch
from diffusers import ConfigMixin
from torch import Tensor

from .functional import ORDERS

# Fields that mean the same in every scheduler. Of the others, eta and threshold mean something else from rule to rule.
SHARED_FIELDS = ("order", "temperature", "top_p", "top_k", "mask_token_id")

# The most that a whole number among the settings may be.
MOST = 2**31 - 1
# The most steps of one run. Each is a forward pass: a number beyond was meant as no limit, and the run would never end.
MOST_STEPS = 1_000_000


class SchedulerConfig(ConfigMixin):
    """The config of our schedulers: it says what its fields mean, so that another class takes only what it has.

    `fields_as` is the name of a class; of two schedulers with the same, fields of one name mean the same. A class that
    says none gets its own name, which its subclasses inherit.
    """

    fields_as: str

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "fields_as"):
            cls.fields_as = cls.__name__

    def register_to_config(self, **kwargs):
        """As diffusers', with the names of the class and of that whose fields it has."""
        names = {"_class_name": type(self).__name__, "_fields_as": self.fields_as}
        super().register_to_config(**kwargs | names)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from the config of another, or of any that diffusers has; keyword arguments replace fields.

        `PrismScheduler`, `SelfConfidenceScheduler`, `PromptConfidenceScheduler`, `DrawConfidenceScheduler` and
        `MDLMScheduler` take all fields of each other and of diffusers'
        `BlockRefinementScheduler`, and keep in their config what they have no use for, for the way back; of any other
        class a scheduler takes those of `SHARED_FIELDS`. An amount of remasking (`num_remask`, `eta`,
        `quality_threshold`) given here takes the place of those there that exclude it.
        """
        kept = {}
        if isinstance(config, Mapping):
            if "accept_quality" in config:  # its name in older saved configs, without a cap
                config = {name: value for name, value in config.items() if name != "accept_quality"} | (
                    {}
                    if config["accept_quality"] is None
                    else {"quality_threshold": config["accept_quality"], "max_share": 1.0}
                )
            names = cls._get_init_keys(cls)
            if meaning_of(config) not in (None, cls.fields_as):
                config = {name: config[name] for name in SHARED_FIELDS if name in config and name in names}
            replaced = replaced_amounts(config, kwargs)
            kwargs = {name: value for name, value in replaced.items() if name in names} | kwargs
            # Set aside, as diffusers would take them for mistakes, and say so.
            related = (kind for kind in all_kinds() if kind.fields_as == cls.fields_as)
            foreign = {name for kind in related for name in cls._get_init_keys(kind)} - names
            kept = {name: config[name] for name in foreign & set(config)}
            config = {name: value for name, value in config.items() if name not in kept}
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).register_to_config(**kept)
        return made


def all_kinds(kind: type = SchedulerConfig) -> Iterator[type]:
    """Our schedulers and all subclasses that users have made of them."""
    for below in kind.__subclasses__():
        yield below
        yield from all_kinds(below)


def meaning_of(config: Mapping) -> str | None:
    """The `fields_as` of the class that a config is of; None for plain fields, which are for whoever is given them.

    Configs of diffusers, and those saved before there was a `_fields_as`, have the name of the class alone.
    """
    name = config.get("_class_name")
    of_class = next((kind.fields_as for kind in all_kinds() if kind.__name__ == name), name)
    return config.get("_fields_as", of_class)


def replaced_amounts(config: Mapping, given: Mapping) -> dict:
    """The fields of a config that an amount of remasking given beside it excludes, at values that stand aside."""
    replaced = {}
    if given.get("eta") is not None:
        replaced |= {"num_remask": None, "quality_threshold": None}
    if given.get("num_remask") is not None or given.get("quality_threshold") is not None:
        replaced |= {"eta": None, "eta_schedule": "constant"}
    if given.get("num_remask") == 0:
        replaced["quality_threshold"] = None
    if given.get("quality_threshold") is not None and config.get("num_remask") == 0:
        replaced["num_remask"] = None
    return replaced


def require(valid: bool, name: str, value: object, allowed: str) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed, unless `valid`."""
    if not valid:
        if isinstance(value, int) and value > MOST:
            allowed += f" and at most {MOST}"
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def own_fields(scheduler) -> dict:
    """The fields of a scheduler that its class takes; its config may hold others, kept from another class."""
    names = scheduler._get_init_keys(type(scheduler))
    return {name: value for name, value in scheduler.config.items() if name in names}


def loop_steps(scheduler) -> int:
    """Forwards that a scheduler's refinement loop adds to the steps of each block; 0 for one without a loop."""
    return own_fields(scheduler).get("loop_steps", 0)


def is_int(value: object, low: int) -> bool:
    """Is it an integer (no bool) of at least `low`, and not beyond what a tensor of counts can hold?"""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Is it a finite number (no bool) in [low, high]?"""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and low <= value <= min(high, sys.float_info.max)


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> None:
    """Raise a ValueError for settings that `sample_tokens` cannot follow."""
    require(is_number(temperature, 0), "temperature", temperature, "a number of at least 0")
    require(top_p is None or (is_number(top_p, 0, 1) and top_p > 0), "top_p", top_p, "None or a number in (0, 1]")
    require(top_k is None or is_int(top_k, 1), "top_k", top_k, "None or an integer of at least 1")


def check_config(config: Mapping) -> None:
    """Raise a ValueError for wrong values of the config fields that all our schedulers share."""
    require(config["order"] in ORDERS, "order", config["order"], f"one of {ORDERS}")
    check_sampling(config["temperature"], config["top_p"], config["top_k"])
    token = config["mask_token_id"]
    require(token is None or is_int(token, 0), "mask_token_id", token, "None or a token id of at least 0")


def check_run(num_inference_steps: int, block_length: int | None) -> None:
    """Raise a ValueError for arguments of `set_timesteps` that are no integers of at least 1, or steps without end."""
    valid = is_int(num_inference_steps, 1) and num_inference_steps <= MOST_STEPS
    require(valid, "num_inference_steps", num_inference_steps, f"an integer from 1 to {MOST_STEPS:,}, one forward each")
    valid = block_length is None or is_int(block_length, 1)
    require(valid, "block_length", block_length, "None or an integer of at least 1")


def read_sampling(
    config: Mapping, temperature: float | None, top_p: float | None, top_k: int | None
) -> tuple[float, float | None, int | None]:
    """The sampling settings of one step: the arguments, or where they are None the config.

    Raises:
        ValueError: a value out of range.
    """
    temperature = config["temperature"] if temperature is None else temperature
    top_p = config["top_p"] if top_p is None else top_p
    top_k = config["top_k"] if top_k is None else top_k
    check_sampling(temperature, top_p, top_k)
    return temperature, top_p, top_k


def read_step(
    config: Mapping,
    timesteps: Tensor | None,
    model_output,
    timestep: int | Tensor,
    sample: Tensor,
    generation_mask: Tensor | None,
    mask_token_id: int | None,
) -> tuple[int, Tensor, int]:
    """Check what every `step` is given and fill in what was left out.

    Returns:
        the timestep as an int, the generation mask (all true if it was None), and the mask token (the config's if it
        was None).
    Raises:
        ValueError: a wrong shape or dtype, a timestep outside the schedule, or no mask token.
    """
    if timesteps is None:
        raise ValueError("There are no timesteps yet: call `set_timesteps(num_inference_steps)` before `step`.")
    index = int(timestep)
    require(0 <= index < len(timesteps), "timestep", index, f"one of `timesteps`, which are 0 to {len(timesteps) - 1}")
    integers = sample.ndim == 2 and not (sample.is_floating_point() or sample.dtype == torch.bool)
    require(integers, "sample", f"{sample.dtype} {tuple(sample.shape)}", "token ids of shape (B, L)")
    if isinstance(model_output, Tensor):
        aligned = model_output.ndim == 3 and model_output.shape[:2] == sample.shape
        shape = tuple(model_output.shape)
        require(aligned, "model_output", shape, f"logits (B, L, V) with (B, L) = {tuple(sample.shape)}")
    if generation_mask is None:
        generation_mask = torch.ones_like(sample, dtype=torch.bool)
    given = f"{generation_mask.dtype} {tuple(generation_mask.shape)}"
    fits = generation_mask.dtype == torch.bool and generation_mask.shape == sample.shape
    require(fits, "generation_mask", given, f"torch.bool {tuple(sample.shape)}, as `sample`")
    mask_token_id = config["mask_token_id"] if mask_token_id is None else mask_token_id
    require(is_int(mask_token_id, 0), "mask_token_id", mask_token_id, "a token id, here or in the scheduler's config")
    return index, generation_mask, mask_token_id
