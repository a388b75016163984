"""Schedulers by name: for command lines, configs of comparisons, and heads on disk that recommend one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from diffusers import ConfigMixin

from .mixin import MDMSchedulerMixin

_package = import_module(__package__)
SCHEDULERS: dict[str, type[MDMSchedulerMixin]] = {
    name: getattr(_package, name) for name in _package.__all__ if name.endswith("Scheduler")
}


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").removesuffix("scheduler")


def scheduler_class(name: str) -> type[MDMSchedulerMixin]:
    """The scheduler class of a name, such as "JudgeAndRepairScheduler", or "judge-and-repair" for short.

    Raises:
        ValueError: no scheduler has that name.
    """
    found = [kind for known, kind in SCHEDULERS.items() if _plain(known) == _plain(str(name))]
    if not found:
        raise ValueError(f"No scheduler is called {name!r}; known: {', '.join(SCHEDULERS)}.")
    return found[0]


def change_scheduler(
    scheduler: ConfigMixin, name: str | None = None, fields: dict[str, Any] | str | None = None
) -> MDMSchedulerMixin:
    """A new scheduler of the class `name`, with the config of `scheduler` and with changed `fields`.

    Args:
        scheduler: the scheduler in use. The new class reads its config by `from_config`.
        name: as `scheduler_class`; None for the class of `scheduler`.
        fields: {field: value} as a dict or as JSON text; None for no change.
    Raises:
        ValueError: an unknown name or field, or `fields` is neither a dict nor a JSON object.
    """
    kind: Any = type(scheduler) if name is None else scheduler_class(name)
    changed = {} if fields is None else fields
    if isinstance(changed, str):
        try:
            changed = json.loads(changed)
        except ValueError as error:
            raise ValueError(f"The fields of a scheduler, {fields!r}, are not JSON: {error}.") from None
    if not isinstance(changed, dict):
        raise ValueError(f'The fields of a scheduler must be an object such as {{"num_remask": 4}}, got {fields!r}.')
    check_field_names(kind, changed)
    return kind.from_config(scheduler.config, **changed)


def check_field_names(kind: type[MDMSchedulerMixin], fields: Iterable[str]) -> None:
    """Raise a ValueError that names the first of these fields that the scheduler class lacks, and all it has."""
    known = set(inspect.signature(kind).parameters)
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}.")
