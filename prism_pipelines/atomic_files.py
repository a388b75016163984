"""Files that are on the disk whole or not at all, also after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write to in a `with` block. It replaces `path` at the end of the block; if that fails, nothing changes.

    Args:
        path: path of the file; its folder must exist.
        mode: "w" for text (UTF-8, line ends are not translated) or "wb" for bytes.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with partial.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write text or bytes to a file, which is on the disk whole or not at all."""
    with atomic_file(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)
