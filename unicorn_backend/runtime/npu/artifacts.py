"""Built kernels on disk: one folder per design, named by its key, complete or not there.

    <cache>/npu/<key>/manifest.json      what it is, from which sources, built with what, and a checksum of each file
                     /kernel.xclbin      configuration of the array, for XRT
                     /instructions.bin   control code: the transfers of one launch
                     /host_model.so      only where the emulator was built: the same kernels for this CPU

Standard library only: `kernels/build.py` uses it without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicorn_backend.runtime.npu.designs import Design, key, source_hash

VERSION = 1  # of the manifest and of the byte layouts in `pack.py`
KERNELS = Path(__file__).parents[3] / "kernels"
EMULATED = "emulated"  # folder of the emulator's artifacts, beside those for hardware
HOST_MODEL = "host model"  # the `built` of artifacts that only the emulator may load
XCLBIN, INSTRUCTIONS, LIBRARY, MANIFEST = "kernel.xclbin", "instructions.bin", "host_model.so", "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A complete, checked artifact."""

    folder: Path
    design: Design
    built: str  # "host model", or versions of the tools

    @property
    def emulated(self) -> bool:
        return self.built == HOST_MODEL


def write(root: Path, design: Design, built: str, make: Callable[[Path], None]) -> Artifact:
    """Let `make` fill a folder, add the manifest, put it into place as a whole."""
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    try:
        make(work)
        files = {p.name: _checksum(p) for p in sorted(work.iterdir()) if p.is_file()}
        manifest = {
            "version": VERSION,
            "kind": design.kind,
            "design": dataclasses.asdict(design),
            "sources": source_hash(KERNELS),
            "built": built,
            "files": files,
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        target = root / key(design)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Artifact(target, design, built)


def find(root: Path, design: Design, emulated: bool) -> Artifact | str:
    """The artifact of exactly this design under `root`, or why there is none that may be used."""
    folder = root / key(design)
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no kernel {key(design)} in {root}: build it with kernels/build.py (docs/npu.md)"
    except ValueError:
        return f"{folder / MANIFEST} is damaged: build the kernel again"
    if manifest.get("version") != VERSION:
        return f"{folder} is of version {manifest.get('version')}, this is {VERSION}: build the kernel again"
    if manifest["kind"] != design.kind or manifest["design"] != dataclasses.asdict(design):
        return f"{folder} holds another kernel than its name says: {manifest['design']}; build it again"
    if KERNELS.is_dir() and manifest["sources"] != source_hash(KERNELS):
        return f"{folder} was built from other sources: build the kernel again"
    if (manifest["built"] == HOST_MODEL) != emulated:
        return f"{folder} was built for {'the emulator' if not emulated else 'hardware'}"
    for name, checksum in manifest["files"].items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            return f"{folder / name} is missing, truncated or changed: build the kernel again"
    return Artifact(folder, design, manifest["built"])


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
