"""`unicorn download`: a model's files from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unicorn_backend import table
from unicorn_backend.errors import CheckpointError

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


def _bytes(files: Sequence[Any]) -> int:
    return sum(int(file.file_size) for file in files)
