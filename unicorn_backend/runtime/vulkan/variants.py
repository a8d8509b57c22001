"""Which build of a shader runs on which device. All give the same integers; `explain_choice` prints a choice."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from unicorn_backend.runtime.vulkan.physical import Features

SPIRV = Path(__file__).parent / "spirv"  # built by shaders/build.py


@dataclass(frozen=True)
class Variant:
    name: str  # of the defines, as in the names of the .spv files
    dot8: bool
    subgroup: bool
    why: str

    def missing(self, features: Features) -> str:
        """What the device lacks for it; "" if nothing."""
        if self.dot8 and not features.integer_dot:
            return "no packed 8-bit dot product"
        if self.subgroup and not (features.shuffle and features.size_control):
            return "no subgroup shuffles, or no full subgroups of a known size"
        if self.subgroup and not 8 <= features.subgroup_size <= 64:
            return f"subgroups of {features.subgroup_size}"
        return ""


# The first that a device can run. Subgroups of 4 have one row quad each: there is nothing to shuffle.
VARIANTS = (
    Variant("dot8_subgroup", True, True, "packed dot products, sums by subgroup shuffles"),
    Variant("dot8_shared", True, False, "packed dot products, sums in shared memory"),
    Variant("int_subgroup", False, True, "products one by one, sums by subgroup shuffles"),
    Variant("int_shared", False, False, "products one by one, sums in shared memory: runs everywhere"),
)


def choose(features: Features) -> Variant:
    return next(variant for variant in VARIANTS if not variant.missing(features))


def explain_choice(features: Features) -> str:
    """One line per variant: taken, or why not."""
    taken = choose(features)
    lines = []
    for variant in VARIANTS:
        verdict = "taken" if variant is taken else variant.missing(features) or "not needed"
        lines.append(f"{variant.name:<14} {variant.why:<64} {verdict}")
    return "\n".join(lines)


@functools.cache
def code(name: str) -> bytes:
    """SPIR-V of a build, such as "ffn_w4g_gemv__gate_up_dot8_subgroup"."""
    return (SPIRV / f"{name}.spv").read_bytes()


@functools.cache
def manifest() -> dict[str, dict[str, str]]:
    """Build -> hashes of its source and of itself, and the compiler."""
    found: dict[str, dict[str, str]] = json.loads((SPIRV / "manifest.json").read_text())["builds"]
    return found
