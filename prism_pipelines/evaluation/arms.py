"""Arms of a comparison, which are schedulers with their settings: from files, and checked that they can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..schedulers.by_name import check_field_names, scheduler_class
from ..schedulers.validation import is_int
from .figure_style import need_matplotlib

# The default arms on puzzles. All reveal in random order. PRISM and self-confidence remask 4 cells per step. ReMDM
# remasks each cell with a probability that follows from eta. MDLM remasks none.
SUDOKU_ARMS: list[dict] = [
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "PRISM", "scheduler": "PrismScheduler", "order": "random", "num_remask": 4},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "num_remask": 4},
    {"name": "ReMDM-cap", "scheduler": "ReMDMScheduler", "strategy": "cap", "eta": 0.04},
]
# The default arms on text, for a model without arms.json. These settings are not tuned.
TEXT_ARMS: list[dict] = [
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "ReMDM-cap", "scheduler": "ReMDMScheduler", "strategy": "cap", "eta": 0.03},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "eta": 0.03},
    {"name": "PRISM", "scheduler": "PrismScheduler", "order": "random", "eta": 0.03},
]
NEEDED = (
    '{"arms": [{"name": "margin", "scheduler": "MDLMScheduler", "order": "margin"}], "forwards": [16], "seeds": [0]}'
)
LARGEST_SEED = 2**63 - 1
FIELDS: dict[str, Any] = {
    "arms": list,
    "forwards": list,
    "seeds": list,
    "temperature": (int, float),
    "quality": str,
    "reference": str,
    "higher_is_better": bool,
}


def read_comparison(path: str | Path) -> dict:
    """Arguments of `run_comparison` from a small .json or .toml file.

    Fields: arms, forwards, seeds (needed), temperature, quality, reference, higher_is_better.

    Returns:
        dict for `run_comparison(pipe, task, **fields, ...)`.
    Raises:
        ValueError: another ending, broken content, a needed field missing or an unknown one.
        OSError: the file cannot be read.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"{path} must end in .json or .toml, got {path.suffix!r}.")
    try:
        fields = json.loads(text) if path.suffix == ".json" else _read_toml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold fields, got {type(fields).__name__}.")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"{path} has unknown fields {unknown}; known: {sorted(FIELDS)}.")
    if missing := [name for name in ("arms", "forwards", "seeds") if name not in fields]:
        raise ValueError(f"{path} lacks {missing}; it needs lists such as {NEEDED}.")
    if wrong := [name for name, value in fields.items() if not isinstance(value, FIELDS[name])]:
        kind = {list: "a list", str: "a string", bool: "true or false"}.get(FIELDS[wrong[0]], "a number")
        raise ValueError(f"{path}: {wrong[0]!r} must be {kind}, got {fields[wrong[0]]!r}.")
    if not all(isinstance(arm, dict) and isinstance(arm.get("model", ""), str) for arm in fields["arms"]):
        raise ValueError(f'{path}: an arm is {{"name": ..., "scheduler": ..., ...config}}, got {fields["arms"]!r}.')
    return fields


def _read_toml(text: str) -> dict:
    try:
        import tomllib
    except ImportError as error:
        raise ValueError("TOML needs Python 3.11 or newer; use JSON.") from error
    return tomllib.loads(text)


def make_scheduler(arm: dict, temperature: float) -> Any:
    """The scheduler of an arm.

    Args:
        arm: {"name", "scheduler", ...config}, where "scheduler" is a class name such as "PrismScheduler". An arm with
            "outside": true may have its own temperature, top_p or top_k, and is marked in the tables. "model" is not
            read here.
        temperature: of all arms without "outside".
    Returns:
        a new scheduler.
    Raises:
        ValueError: an unknown scheduler or setting, or another temperature without "outside".
    """
    check_names(arm)
    config = {key: value for key, value in arm.items() if key not in ("name", "scheduler", "outside", "model")}
    try:
        kind = scheduler_class(arm["scheduler"])
        check_field_names(kind, config)
    except ValueError as error:
        raise ValueError(f"Arm {arm['name']!r}: {error}") from None
    if not arm.get("outside") and config.get("temperature", temperature) != temperature:
        raise ValueError(
            f"Arm {arm['name']!r} has temperature {config['temperature']}, the comparison {temperature}. Arms are "
            'compared at the same temperature; set "outside": true for one that is not compared.'
        )
    try:
        return kind(**{"temperature": temperature, **config})
    except (TypeError, ValueError) as error:
        raise ValueError(f"Arm {arm['name']!r}: {str(error).rstrip('.')}.") from error


def check_comparison(
    arms: list[dict],
    forwards: Sequence[int],
    seeds: Sequence[int],
    temperature: float,
    models: Mapping[str | None, Any],
    reference: str | None = None,
) -> None:
    """Checks the arms of `run_comparison` before anything runs.

    Args:
        arms, forwards, seeds, temperature, reference: as `run_comparison`.
        models: pipelines by name; the pipeline of arms without a "model" has the name None.
    Raises:
        ValueError, ImportError: as `run_comparison`.
    """
    need_matplotlib()  # a missing extra must not show after hours of work
    if not arms or not forwards or not seeds:
        raise ValueError(f"Nothing to compare: {len(arms)} arms, {len(forwards)} forwards, {len(seeds)} seeds.")
    for arm in arms:
        check_names(arm)
    for name, values, least in (("forwards", forwards, 1), ("seeds", seeds, 0)):
        if not all(is_int(value, least, LARGEST_SEED) for value in values):
            raise ValueError(f"`{name}` must be integers of at least {least}, got {values}.")
    for name, values in (("arms", [arm["name"] for arm in arms]), ("forwards", forwards), ("seeds", seeds)):
        if len(set(values)) != len(values):
            raise ValueError(f"`{name}` must not hold one twice, got {values}.")
    names = [arm["name"] for arm in arms]
    if reference is not None and reference not in names:
        raise ValueError(f"`reference` must name an arm, got {reference!r}; arms: {names}.")
    inside = [arm for arm in arms if not arm.get("outside")]
    if not inside:
        raise ValueError('Every arm is "outside": true, so there is nothing to compare.')
    for name in ("top_p", "top_k"):
        found = {arm["name"]: arm.get(name) for arm in inside}
        if len(set(found.values())) > 1:
            raise ValueError(
                f'Arms are compared at the same {name}, got {found}. Set "outside": true for one that is not compared.'
            )
    for arm in arms:
        make_scheduler(arm, temperature)
        if arm.get("model") not in models:
            raise ValueError(f"Arm {arm['name']!r} wants the model {arm['model']!r}, which `models` does not hold.")
        if min(forwards) <= arm.get("loop_steps", 0):
            raise ValueError(
                f"Arm {arm['name']!r}: a loop of {arm['loop_steps']} forwards leaves none of {min(forwards)}."
            )


def check_names(arm: dict) -> None:
    """Raise a ValueError for an arm without a name or a scheduler."""
    if not isinstance(arm.get("name"), str) or not isinstance(arm.get("scheduler"), str):
        raise ValueError(f'An arm is {{"name": ..., "scheduler": ..., ...config}}, got {arm}.')


def outside_names(arms: list[dict]) -> set[str]:
    """Names of the arms with "outside": they are shown, but not compared."""
    return {arm["name"] for arm in arms if arm.get("outside")}


def marked(name: str, outside: set[str]) -> str:
    """The name of an arm, with a mark if it is shown but not compared."""
    return f"{name} (outside)" if name in outside else name
