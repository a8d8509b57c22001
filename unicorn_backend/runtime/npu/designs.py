"""What an NPU kernel is built for: generation, tile and problem sizes, their limits, and the key of the artifact.

Standard library only: `kernels/build.py` and the designs load this file in an IRON environment without torch.

A generation is an array of compute cores with 64 KiB of data memory each, two DMA channels in and two out; a
column has a memory tile of 512 KiB with six channels each way, and a shim tile with two each way.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

CORE_BYTES = 64 * 1024
STACK_BYTES = 1024
MEM_TILE_BYTES = 512 * 1024
CORE_CHANNELS = 2  # DMA channels of a core, each way
MEM_TILE_CHANNELS = 6
SHIM_CHANNELS = 2
MAX_KEYS = 65536  # 255 * 127 * keys stays below 2^31
MAX_K = 131072  # 127 * 127 * K stays below 2^31


class IllegalDesign(ValueError):
    """A parameter that the hardware or a kernel does not take. The message lists the values that it does."""


@dataclass(frozen=True)
class Generation:
    """One kind of NPU."""

    name: str
    chips: str
    architecture: int  # __AIE_ARCH__
    columns: int
    rows: int
    product_rows: int  # rows of one int8 product: UNICORN_MMUL_ROWS
    contexts: int  # hardware contexts of the whole system


GENERATIONS = {
    "npu1": Generation("npu1", "XDNA 1: Phoenix, Hawk Point", 20, 4, 4, 4, 6),
    "npu2": Generation("npu2", "XDNA 2: Strix, Strix Halo, Krackan", 21, 8, 4, 8, 16),
}


def generation(name: str) -> Generation:
    if name not in GENERATIONS:
        raise IllegalDesign(f"generation: got {name!r}, allowed are {', '.join(GENERATIONS)}")
    return GENERATIONS[name]


@dataclass(frozen=True)
class Gemm:
    """y[M, N] = a[M, K] b[K, N] int8 -> int32, M = `tokens` rows per launch.

    Core (row r, column c) computes tiles (r, c), (r, c + columns), ...: rows of a are broadcast along rows of the
    array, columns of b down its columns, K is walked in steps of `tile_k`.
    """

    target: str
    k: int
    n: int
    tile_m: int = 32
    tile_k: int = 128
    tile_n: int = 64

    kind: ClassVar[str] = "gemm_i8"

    def __post_init__(self) -> None:
        two = 2 * generation(self.target).product_rows
        _one_of("tile_m", self.tile_m, [m for m in range(two, 129, two) if self._fits(tile_m=m)])
        _one_of("tile_k", self.tile_k, [k for k in (32, 64, 128, 256) if self._fits(tile_k=k)])
        _one_of("tile_n", self.tile_n, [n for n in range(16, 129, 16) if self._fits(tile_n=n)])
        _multiple("k", self.k, self.tile_k, MAX_K)
        _multiple("n", self.n, self.tile_n * self.generation.columns, 64 * self.tile_n * self.generation.columns)

    @property
    def generation(self) -> Generation:
        return generation(self.target)

    @property
    def tokens(self) -> int:
        """Rows per launch."""
        return self.tile_m * self.generation.rows

    @property
    def operations(self) -> int:
        """Multiplications and additions of a launch."""
        return 2 * self.tokens * self.k * self.n

    @property
    def steps(self) -> int:
        return self.k // self.tile_k

    @property
    def rounds(self) -> int:
        """Tiles of c per core. A shim descriptor repeats at most 64 times, hence the limit of n."""
        return self.n // (self.tile_n * self.generation.columns)

    def core_bytes(self, **changed: int) -> int:
        """Data memory of one core: a and b double-buffered, c double-buffered, stack."""
        m, k = changed.get("tile_m", self.tile_m), changed.get("tile_k", self.tile_k)
        n = changed.get("tile_n", self.tile_n)
        return 2 * (m * k + k * n + 4 * m * n) + STACK_BYTES

    def _fits(self, **changed: int) -> bool:
        return self.core_bytes(**changed) <= CORE_BYTES

    @property
    def buffer_bytes(self) -> tuple[int, int, int]:
        """Sizes of the launch's buffers: a, b, c."""
        return self.tokens * self.k, self.k * self.n, 4 * self.tokens * self.n

    @property
    def instruction(self) -> tuple[int, ...]:
        """What the host model's launcher reads instead of control code."""
        return 1, self.k, self.n, self.tile_m, self.tile_k, self.tile_n, self.generation.rows, self.generation.columns

    @property
    def defines(self) -> dict[str, int]:
        return {"UNICORN_M": self.tile_m, "UNICORN_K": self.tile_k, "UNICORN_N": self.tile_n}


@dataclass(frozen=True)
class Attention:
    """Flash attention: every core owns `rows` query rows, all see the same `blocks` blocks of `keys` keys.

    A launch covers `rows * cores` query rows of one K/V head and `keys * blocks` keys; longer ranges of keys are
    several launches, merged on the host by (m, l).
    """

    target: str
    head_dim: int
    rows: int = 16
    keys: int = 32
    blocks: int = 16

    kind: ClassVar[str] = "attention_i8"

    def __post_init__(self) -> None:
        _one_of("head_dim", self.head_dim, [64, 96, 128, 192, 256])
        generation(self.target)
        _one_of("keys", self.keys, [k for k in range(16, 129, 16) if self._fits(keys=k)])
        _one_of("rows", self.rows, [r for r in range(16, 129, 16) if self._fits(rows=r)])
        _multiple("blocks", self.blocks, 1, MAX_KEYS // self.keys)

    @property
    def generation(self) -> Generation:
        return generation(self.target)

    @property
    def cores(self) -> int:
        return self.generation.rows * self.generation.columns

    @property
    def query_rows(self) -> int:
        """Query rows per launch."""
        return self.rows * self.cores

    @property
    def operations(self) -> int:
        """Multiplications and additions of a launch in which half of the pairs are masked (causal)."""
        return 2 * self.query_rows * self.key_range * self.head_dim

    @property
    def key_range(self) -> int:
        """Keys per launch."""
        return self.keys * self.blocks

    @property
    def query_bytes(self) -> int:
        """Bytes of a query block: q, mult, first, last, shift (see `attention_i8.cc`), a multiple of 64."""
        return _round_up(self.rows * self.head_dim + 10 * self.rows + 32, 64)

    @property
    def keys_bytes(self) -> int:
        return 2 * self.keys * self.head_dim + 64

    @property
    def state_words(self) -> int:
        """int32 words of a state: m, l, O."""
        return self.rows * (2 + self.head_dim)

    def core_bytes(self, **changed: int) -> int:
        """Data memory of one core: query and state once, keys double-buffered, scores, weights, stack."""
        rows, keys = changed.get("rows", self.rows), changed.get("keys", self.keys)
        product = generation(self.target).product_rows
        query = _round_up(rows * self.head_dim + 10 * rows + 32, 64)
        scratch = 5 * product * keys
        return query + 4 * rows * (2 + self.head_dim) + 2 * (2 * keys * self.head_dim + 64) + scratch + STACK_BYTES

    def _fits(self, **changed: int) -> bool:
        return self.core_bytes(**changed) <= CORE_BYTES

    @property
    def buffer_bytes(self) -> tuple[int, int, int]:
        """Sizes of the launch's buffers: queries, keys, states."""
        return self.query_bytes * self.cores, self.keys_bytes * self.blocks, 4 * self.state_words * self.cores

    @property
    def instruction(self) -> tuple[int, ...]:
        return 2, self.head_dim, self.rows, self.keys, self.blocks, self.generation.rows, self.generation.columns, 0

    @property
    def defines(self) -> dict[str, int]:
        return {"UNICORN_ROWS": self.rows, "UNICORN_KEYS": self.keys, "UNICORN_HEAD_DIM": self.head_dim}


Design = Gemm | Attention


def source_hash(folder: Path) -> str:
    """Hash over every source that decides what a kernel computes: `kernels/aie`, `kernels/designs` and this file."""
    digest = hashlib.sha256()
    files = [*sorted(folder.glob("aie/*")), *sorted(folder.glob("designs/*.py")), Path(__file__)]
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def key(design: Design) -> str:
    """Name of the artifact: every parameter is in it. An xclbin built for another K computes wrong sums silently."""
    fields = [f"{name}{value}" for name, value in dataclasses.asdict(design).items() if name != "target"]
    return "-".join([design.kind, design.target, *fields])


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _one_of(name: str, value: int, allowed: list[int]) -> None:
    if value not in allowed:
        raise IllegalDesign(
            f"{name}: got {value}, legal with the other parameters are {', '.join(map(str, allowed)) or 'none'} "
            f"({CORE_BYTES // 1024} KiB of memory per core)"
        )


def _multiple(name: str, value: int, step: int, most: int) -> None:
    if value <= 0 or value % step or value > most:
        raise IllegalDesign(f"{name}: got {value}, legal are the multiples of {step} from {step} to {most}")
