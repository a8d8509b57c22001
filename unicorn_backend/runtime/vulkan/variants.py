"""Which build of a shader runs on which device. All give the same integers; `explain_choice` prints a choice."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from unicorn_backend.layouts import GROUP, ROWS
from unicorn_backend.runtime.vulkan.physical import Features, MatrixShape

# shaders/include/matrix.glsl: rows and tokens of a small workgroup, its threads, what a large one shares at most
MATRIX_BLOCK, MATRIX_THREADS, MATRIX_SHARED_BYTES = 64, 256, 4 * (2 * 256 * 12 + 2 * 128 + 128 + 2 * 128)
SPIRV = Path(__file__).parent / "spirv"  # built by shaders/build.py


@dataclass(frozen=True)
class Variant:
    name: str
    dot8: bool
    subgroup: bool
    why: str
    matrix: bool = False  # more than 8 tokens

    @property
    def dot(self) -> str:
        """In the names of the .spv files."""
        return "dot8" if self.dot8 else "int"

    @property
    def sums(self) -> str:
        """Likewise, of the GEMVs."""
        return "subgroup" if self.subgroup else "shared"

    def missing(self, features: Features) -> str:
        """What the device lacks for it; "" if nothing."""
        if self.dot8 and not features.integer_dot:
            return "no packed 8-bit dot product"
        if self.subgroup and not (features.shuffle and features.size_control):
            return "no subgroup shuffles, or no full subgroups of a known size"
        if self.subgroup and not 8 <= features.subgroup_size <= 64:
            return f"subgroups of {features.subgroup_size}"
        return _missing_matrix(features) if self.matrix else ""

    def passed_over(self, features: Features) -> str:
        """Why the first of the table is not this one; "" if it is."""
        return "" if self is VARIANTS[0] else VARIANTS[0].missing(features)


def _missing_matrix(features: Features) -> str:
    if not features.matrices:
        return "no cooperative matrices of int8 with int32 sums"
    if matrix_shape(features) is None:
        shapes = ", ".join("x".join(map(str, shape)) for shape in features.matrices)
        return f"cooperative matrices of {shapes} with subgroups of {features.subgroup_size}"
    if features.shared_bytes < MATRIX_SHARED_BYTES:
        return f"{features.shared_bytes} bytes of shared memory, cooperative matrices need {MATRIX_SHARED_BYTES}"
    return ""


def matrix_shape(features: Features) -> MatrixShape | None:
    """The first of the device's that a workgroup can cut its block into: two for each subgroup."""
    for shape in features.matrices:
        m, n, k = shape
        whole = MATRIX_BLOCK % (2 * m) == ROWS % n == GROUP % k == 0
        if whole and MATRIX_BLOCK**2 // (2 * m * n) * features.subgroup_size == MATRIX_THREADS:
            return shape
    return None


# The first that a device can run. Subgroups of 4 have one row quad each: there is nothing to shuffle.
VARIANTS = (
    Variant("matrix", True, True, "cooperative matrices from 9 tokens on, else as the next", True),
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
