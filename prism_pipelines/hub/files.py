"""Files of a folder or a repository of the Hub, one at a time; and why one cannot be had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError


def fetch_file(path: str, name: str, where: dict) -> str | None:
    """Local path of a file of a folder or Hub repository, or None if it has no such file.

    Raises:
        OSError: no such repository, or the Hub cannot be reached and nothing is known about the file.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return str(file) if file.is_file() else None
    try:
        return hf_hub_download(path, name, **where)
    except LocalEntryNotFoundError as error:
        known = try_to_load_from_cache(path, name, cache_dir=where.get("cache_dir"), revision=where.get("revision"))
        if where.get("local_files_only") or is_offline_mode() or known is _CACHED_NO_EXIST:
            return None
        raise OSError(f"The Hub cannot be reached, and {name} of {path!r} was not downloaded before.") from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise OSError(f"{path!r} is neither a folder here nor an id on the Hub (owner/name).") from error


def read_json(path: str, name: str, where: dict) -> dict | None:
    """A JSON file of a folder or Hub repository, or None if it has no such file."""
    file = fetch_file(path, name, where)
    return None if file is None else json.loads(Path(file).read_text())


def out_of_reach(path: str, name: str, where: dict) -> bool:
    """Is a file of the Hub unknown to the cache while nothing may be fetched?"""
    if Path(path).is_dir() or not (where.get("local_files_only") or is_offline_mode()):
        return False
    known = try_to_load_from_cache(path, name, cache_dir=where.get("cache_dir"), revision=where.get("revision"))
    return known is None


def absence(path: str, name: str, where: dict) -> str:
    """That a file is not there, in words: the repository lacks it, or it is not in the cache and may not be fetched."""
    if not out_of_reach(path, name, where):
        return f"{path!r} has no {name}"
    why = "local_files_only=True" if where.get("local_files_only") else "HF_HUB_OFFLINE"
    return f"{name} of {path!r} was not downloaded before, and {why} forbids to fetch it now"


def inside(subfolder: str | None, name: str) -> str:
    """Path of a file inside a repository."""
    return f"{subfolder}/{name}" if subfolder else name


def is_hub_id(name: str | None) -> bool:
    """Does a name look like owner/name on the Hub, and not like a path?"""
    return bool(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def module_digest(module) -> str:
    """Hash of the first 64 numbers of each tensor: it notices training and another dtype, and costs milliseconds."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":
            digest.update(bytes(tensor.flatten()[:64].cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]
