"""The folder that is being written: it appears complete or not at all, and can be continued.

Everything goes into `<folder>.partial` beside the target, which is renamed at the end. A journal in it
has one line per finished weight, with the checksums of its tensors; `resume` checks those and goes on
with the rest. A kill at any moment leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from unicorn_backend.errors import CheckpointError, UnicornError
from unicorn_backend.formats.safetensors import as_bytes, sha256_of_range
from unicorn_backend.formats.target import Layout, Place

JOURNAL = "journal.jsonl"
SPARE_BYTES = 64_000_000  # for the tokenizer and the like


class Output:
    """Context manager: `write` tensors by pieces, `finish_weight`, and `publish` at the end.

    layout: the files, and the place of every tensor in them.
    identity: what must be the same for a run to be continued.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        identity: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.done: dict[str, dict[str, Any]] = {}  # finished weights of an interrupted run
        self._overwrite, self._resume = overwrite, resume
        self._identity = json.loads(json.dumps(identity))
        self._layout = layout
        self._files: dict[str, int] = {}
        self._hashes: dict[str, Any] = {}
        self._journal: IO[str] | None = None
        self._disk_failed = False

    def __enter__(self) -> Output:
        if self.folder.exists() and not self._overwrite:
            raise CheckpointError(f"{self.folder} exists; give another folder or --overwrite")
        with self._named_errors():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir(exist_ok=True)
            self._journal = open(self.partial / JOURNAL, "a+", encoding="utf-8")
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._journal.close()
                raise CheckpointError(f"{self.partial}: another process is writing it") from error
            if not (self._resume and self._continue()):
                self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._close()
        # Unusable input will not become usable; what a full disk or a signal stopped can be continued.
        if isinstance(error, UnicornError) and not self._disk_failed:
            shutil.rmtree(self.partial, ignore_errors=True)

    def place(self, name: str) -> Place:
        """Where a tensor is."""
        return self._layout.places[name]

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """Bytes of tensor `name` from `offset` on, in ascending order; adds them to its checksum."""
        view = as_bytes(data)
        place = self.place(name)
        with self._named_errors(f"{place.file}, tensor {name!r}"):
            written = 0
            while written < len(view):
                written += os.pwrite(self._files[place.file], view[written:], place.offset + offset + written)
        self._hashes.setdefault(name, hashlib.sha256()).update(view)

    def checksum(self, name: str) -> str:
        """SHA-256 of the bytes of a tensor that was written whole."""
        digest: str = self._hashes.pop(name).hexdigest()
        return digest

    def finish_weight(self, record: dict[str, Any]) -> None:
        """Note a finished weight; `record["tensors"]` has the checksum of each of its tensors."""
        with self._named_errors(JOURNAL):
            self._note(record)

    def publish(self) -> None:
        """Flush everything to the disk and give the folder its name."""
        with self._named_errors():
            for file in self._files.values():
                os.fsync(file)
            self._close()
            (self.partial / JOURNAL).unlink()
            for path in self.partial.rglob("*"):
                _sync(path)
            _sync(self.partial)
            old = self.folder.with_name(f"{self.folder.name}.replaced")
            if self.folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.folder, old)
            os.rename(self.partial, self.folder)
            _sync(self.folder.parent)
            shutil.rmtree(old, ignore_errors=True)

    def _begin(self) -> None:
        """An empty partial folder with the headers of all shards."""
        assert self._journal is not None
        for path in self.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._journal.truncate(0)
        self._check_space()
        self._note({"identity": self._identity})
        for name, text in self._layout.beside.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        for shard, header in self._layout.headers.items():
            self._open(shard)
            os.pwrite(self._files[shard], header, 0)

    def _continue(self) -> bool:
        """True if the folder holds a run of the same identity: its finished weights are in `done`."""
        assert self._journal is not None
        self._journal.seek(0)
        lines = list(_whole_lines(self._journal))
        if not lines:
            return False
        if lines[0].get("identity") != self._identity:
            raise CheckpointError(
                f"{self.partial} was begun from another source, recipe or version: run without --resume to start over"
            )
        if not all((self.partial / name).is_file() for name in (*self._layout.headers, *self._layout.beside)):
            return False
        for shard in self._layout.headers:
            self._open(shard)
        self.done = {record["name"]: record for record in lines[1:] if self._intact(record)}
        self._journal.truncate(0)  # without a line that was cut
        self._note({"identity": self._identity})
        for record in self.done.values():
            self._note(record)
        return True

    def _intact(self, record: Mapping[str, Any]) -> bool:
        """True if the tensors of a finished weight are in the files as they were written."""
        for name, entry in record.get("tensors", {}).items():
            place = self.place(name)
            if sha256_of_range(self.partial / place.file, place.offset, place.nbytes) != entry["sha256"]:
                return False
        return True

    def _check_space(self) -> None:
        """Refuse at once what would fail after minutes."""
        needed = sum(place.nbytes for place in self._layout.places.values()) + SPARE_BYTES
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            shutil.rmtree(self.partial)
            raise CheckpointError(
                f"{self.partial.parent}: the disk has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed"
            )

    def _open(self, shard: str) -> None:
        self._files[shard] = os.open(self.partial / shard, os.O_RDWR | os.O_CREAT, 0o644)

    def _note(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @contextlib.contextmanager
    def _named_errors(self, what: str = "") -> Iterator[None]:
        """Turn errors of the disk into a `CheckpointError` that names the file and keeps what was written."""
        try:
            yield
        except OSError as error:
            self._disk_failed = True
            path = self.partial / what if what else error.filename or self.partial
            hint = "; free some space and run again with --resume" if error.errno == errno.ENOSPC else ""
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}{hint}") from error


def _whole_lines(journal: IO[str]) -> Iterator[dict[str, Any]]:
    """The records up to the first line that was cut."""
    for line in journal:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
