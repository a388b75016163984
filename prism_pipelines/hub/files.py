"""Files of a folder or a repository of the Hub, one at a time, and why a file is not available."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

PATIENCE = 5.0  # seconds that the Hub has to answer
_down: set[str] = set()  # addresses of Hubs that did not answer when they were last asked


def fetch_file(path: str, name: str, hub_kwargs: dict[str, Any], download: bool = True) -> str | None:
    """Local path of a file of a folder or Hub repository, or None if it has no such file.

    With `download=False` a file on the Hub is not downloaded, and the result is its address.

    Raises:
        OSError: no such repository, or the Hub cannot be reached and nothing is known about the file.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return str(file) if file.is_file() else None
    try:
        if not download:
            url = hf_hub_url(path, name, revision=hub_kwargs.get("revision"))
            return get_hf_file_metadata(url, token=hub_kwargs.get("token")).location
        return hf_hub_download(path, name, **hub_kwargs)
    except LocalEntryNotFoundError as error:
        known = try_to_load_from_cache(
            path, name, cache_dir=hub_kwargs.get("cache_dir"), revision=hub_kwargs.get("revision")
        )
        if hub_kwargs.get("local_files_only") or is_offline_mode() or known is _CACHED_NO_EXIST:
            return None
        raise OSError(f"The Hub cannot be reached, and {name} of {path!r} was not downloaded before.") from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise OSError(f"{path!r} is neither a folder here nor an id on the Hub (owner/name).") from error


def reachable(path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`hub_kwargs`, with local_files_only=True if `path` is on the Hub and the Hub does not answer.

    The Hub is asked once, without retries. Otherwise each file would wait for its own retries.

    Warns:
        UserWarning: the Hub does not answer.
    """
    if Path(path).is_dir() or hub_kwargs.get("local_files_only") or is_offline_mode():
        return hub_kwargs
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        reason = f"status {answer.status_code}" if answer.status_code >= 500 else None
    except Exception as error:  # which class is raised depends on the release of huggingface_hub
        reason = str(error) or type(error).__name__
    _down.discard(constants.ENDPOINT)
    if reason is None:
        return hub_kwargs
    _down.add(constants.ENDPOINT)
    warnings.warn(
        f"The Hub ({constants.ENDPOINT}) cannot be reached ({reason}): files that were downloaded before are used.",
        stacklevel=3,
    )
    return hub_kwargs | {"local_files_only": True}


def read_json(path: str, name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON file of a folder or Hub repository, or None if it has no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    file = fetch_file(path, name, hub_kwargs)
    if file is None:
        return None
    try:
        content = json.loads(Path(file).read_text())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or too deep
        raise ValueError(f"{name} of {path!r} is not JSON: {error}. Download or write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of {path!r} must be a JSON object, got a {type(content).__name__}.")
    return content


def out_of_reach(path: str, name: str, hub_kwargs: dict[str, Any]) -> bool:
    """Is a file on the Hub but not in the cache, and downloads are not allowed?"""
    if Path(path).is_dir() or not (hub_kwargs.get("local_files_only") or is_offline_mode()):
        return False
    known = try_to_load_from_cache(
        path, name, cache_dir=hub_kwargs.get("cache_dir"), revision=hub_kwargs.get("revision")
    )
    return known is None


def absence(path: str, name: str, hub_kwargs: dict[str, Any]) -> str:
    """Why a file is missing, as a clause: the repository lacks it, or it is not cached and may not be downloaded."""
    if not out_of_reach(path, name, hub_kwargs):
        return f"{path!r} has no {name}"
    if constants.ENDPOINT in _down:
        return f"{name} of {path!r} was not downloaded before, and the Hub ({constants.ENDPOINT}) cannot be reached"
    why = "local_files_only=True" if hub_kwargs.get("local_files_only") else "HF_HUB_OFFLINE"
    return f"{name} of {path!r} was not downloaded before, and {why} forbids to download it now"


def inside(subfolder: str | None, name: str) -> str:
    """Path of a file inside a repository."""
    return f"{subfolder}/{name}" if subfolder else name


def is_hub_id(name: str | None) -> TypeGuard[str]:
    """Does a name look like owner/name on the Hub, and not like a path?"""
    if not name or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return False
    return not Path(name).exists()


def tensor_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file by its name. Only the header is read, so nothing is allocated.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as header:
            return {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Download it again.") from error
