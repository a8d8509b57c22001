"""One line of `unicorn doctor`. Standard library only: the NPU's checks are tested where there is no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`status` is "ok", "warn", "fail" or "info"; `fix` says what to do about all but the first."""

    name: str
    status: str
    found: str
    fix: str = ""
