"""The drivers' compiled pipelines on disk, one file per device and driver build.

A driver checks what it is given only by a header, so the file carries a hash: a damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from unicorn_backend.options import cache_folder

log = logging.getLogger(__name__)

MAGIC = b"unicorn pipelines 1\n"


def path_of(key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "pipelines" / f"{key}.bin"


def read(key: str) -> bytes:
    """What `write` was given for this device and driver; b"" if there is nothing, or something damaged."""
    path = path_of(key)
    try:
        data = path.read_bytes() if path is not None else b""
    except OSError:  # none yet, or not readable: compiled anew
        return b""
    start = len(MAGIC) + 32
    if data[: len(MAGIC)] == MAGIC and hashlib.sha256(data[start:]).digest() == data[len(MAGIC) : start]:
        return data[start:]
    if data:
        log.warning("pipeline cache: %s is damaged and will be written anew", path)
    return b""


def write(key: str, data: bytes) -> None:
    """Whole or not at all."""
    path = path_of(key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError as error:
        log.info("pipeline cache: not written: %s", error)
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + hashlib.sha256(data).digest() + data)
        os.replace(temporary, path)
    except OSError as error:
        log.info("pipeline cache: not written: %s", error)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
