"""`unicorn download` and `unicorn publish`: models from and to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from unicorn_backend import table
from unicorn_backend.errors import CheckpointError
from unicorn_backend.quantize.verify import verify

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
"""What a model needs; repositories often hold the same weights in other formats too."""


@dataclass(frozen=True)
class Downloaded:
    """folder: where the files are ("" in a dry run); fetched: of how many bytes had to come."""

    model: str
    folder: str
    files: int
    bytes: int
    fetched_bytes: int

    def __str__(self) -> str:
        rest = f"{self.files} files, {table.size(self.bytes)}, {table.size(self.fetched_bytes)} of them to fetch"
        return f"{self.model}: {rest}" if not self.folder else f"{self.folder}: {rest}"


def download(model: str, revision: str | None = None, to: Path | None = None, dry_run: bool = False) -> Downloaded:
    """Fetch what is missing. Files that are complete are kept, partial ones continued.

    Raises CheckpointError with the reason.
    """
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{model} was not fetched: HF_HUB_OFFLINE is set; unset it to download")
    try:
        plan = snapshot_download(model, revision=revision, local_dir=to, allow_patterns=list(PATTERNS), dry_run=True)
        folder = (
            "" if dry_run else snapshot_download(model, revision=revision, local_dir=to, allow_patterns=list(PATTERNS))
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not on the hub, or is private: check the name, or `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} is not a hub id such as google/gemma-3-1b-it: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model} could not be fetched ({str(error).strip().splitlines()[0]}); "
            "what has arrived is kept: run it again"
        ) from error
    missing = [f for f in plan if f.will_download]
    return Downloaded(model, str(folder), len(plan), _bytes(plan), _bytes(missing))


@dataclass(frozen=True)
class Publication:
    """What `publish` would upload, or has uploaded (`url` is "" before)."""

    folder: str
    repository: str
    files: tuple[tuple[str, int], ...]  # name, bytes
    url: str = ""

    def __str__(self) -> str:
        total = table.size(sum(size for _, size in self.files))
        lines = [f"{name}  {table.size(size)}" for name, size in self.files]
        if self.url:
            return "\n".join([*lines, f"{len(self.files)} files, {total}: {self.url}"])
        return "\n".join(
            [*lines, f"{len(self.files)} files, {total}; nothing was uploaded: --yes uploads to {self.repository}"]
        )


def publish(folder: Path, repository: str, *, upload: bool = False, private: bool = True) -> Publication:
    """List (or upload) a checkpoint that `unicorn quantize` wrote, after every tensor was checked.

    Raises CheckpointError: a damaged folder, no model card, a bad name, no access to the repository.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise CheckpointError(f"--repo: {error}") from error
    if problems := verify(folder, progress=False):
        raise CheckpointError(f"{folder} is damaged, so it was not published: {problems[0]}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if folder / "README.md" not in paths:
        raise CheckpointError(f"{folder} has no README.md (model card): write it again with `unicorn quantize`")
    plan = Publication(str(folder), repository, tuple((str(p.relative_to(folder)), p.stat().st_size) for p in paths))
    if not upload:
        return plan
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("nothing was uploaded: HF_HUB_OFFLINE is set")
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Quantized by unicorn_backend"
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{repository}: {reason}; `hf auth login` with a token that may write") from error
    return replace(plan, url=str(commit))


def _bytes(files: Sequence[Any]) -> int:
    return sum(int(file.file_size) for file in files)
