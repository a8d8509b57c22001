"""Measure the attention core alone: decode as bytes of K and V per second, prefill as FLOP per second.

    python benchmarks/attention.py                        # JSON to stdout
    python benchmarks/attention.py --isa avx2 --threads 1 --output attention.json

Decode walks over many caches, so that K and V come from memory and not from the processor's caches; the read
probe beside it is a plain sum over a buffer, timed in the same rounds. The core is compiled here by itself and
called through ctypes: no projection and no dispatcher is in the numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = Path(__file__).resolve().parents[1] / "ops"
ISAS = ("avx512vnni", "avx512", "avx2", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
SHAPES = {"gemma3-1b": (4, 1, 256), "gemma3-4b": (8, 4, 256)}  # query heads, K/V heads, head width
LENGTHS = (512, 2048, 8192)
GUARD = 4096  # bytes behind the workspace that have to stay as they are

HARNESS = """
#include "attention.h"
namespace unicorn { bool attention_set_isa(const char*); }
extern "C" {
size_t core_workspace(const unicorn::AttentionArgs* a) { return unicorn::attention_workspace_bytes(*a); }
void core_run(const unicorn::AttentionArgs* a) { unicorn::attention(*a); }
bool core_set_isa(const char* name) { return unicorn::attention_set_isa(name); }
size_t core_args_size() { return sizeof(unicorn::AttentionArgs); }
uint64_t core_read(const uint64_t* p, int64_t n, int threads) {
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static)
  for (int64_t i = 0; i < n; i += 8) {
    sum += (p[i] ^ p[i + 1]) + (p[i + 2] ^ p[i + 3]) + (p[i + 4] ^ p[i + 5]) + (p[i + 6] ^ p[i + 7]);
  }
  return sum;
}
}
"""


class Args(ctypes.Structure):
    """`unicorn::AttentionArgs`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("mask", ctypes.c_void_p),
        ("mask_kind", ctypes.c_int),
        ("mask_stride", ctypes.c_int64 * 4),
        ("causal", ctypes.c_bool),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("B", "H", "Hkv", "T", "S", "D", "Dv")),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("threads", ctypes.c_int),
    )


class Core:
    """The attention core, compiled from `ops/` into `folder`."""

    def __init__(self, folder: Path) -> None:
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fPIC"]
        harness = folder / "harness.cpp"
        harness.write_text(HARNESS, encoding="utf-8")
        sources = [harness, *sorted(OPS.glob("attention*.cpp"))]
        objects = [folder / f"{source.stem}.o" for source in sources]
        jobs = [
            subprocess.Popen([*compiler, f"-I{OPS}", "-c", str(source), "-o", str(target)])
            for source, target in zip(sources, objects, strict=True)
        ]
        if any([job.wait() for job in jobs]):
            raise RuntimeError(f"{compiler[0]} could not compile the attention core; its message is above")
        library = folder / "attention.so"
        subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.core_set_isa.restype = ctypes.c_bool
        for name in ("core_workspace", "core_args_size", "core_read"):
            getattr(self.library, name).restype = ctypes.c_size_t
        assert self.library.core_args_size() == ctypes.sizeof(Args)

    def set_isa(self, name: str) -> bool:
        """Whether this CPU runs it; the best one for ""."""
        return bool(self.library.core_set_isa(name.encode()))

    def read(self, data: Tensor, threads: int) -> None:
        """Read a uint8 tensor once."""
        self.library.core_read(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.numel() // 8), threads)

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
        threads: int = 2,
        guard: bool = True,
    ) -> Callable[[], Tensor]:
        """A call without arguments that computes fp32 [B, T, H, Dv] into one tensor; guard: check the workspace."""
        (b, h, t, d), (hkv, s), dv = q.shape, k.shape[1:3], v.shape[3]
        args = Args(causal=causal, scale=scale, softcap=softcap, B=b, H=h, Hkv=hkv, T=t, S=s, D=d, Dv=dv)
        for name, x in (("q", q), ("k", k), ("v", v)):
            setattr(args, name, x.data_ptr())
            getattr(args, f"{name}_stride")[:] = x.stride()[:3]
        args.dtype, args.threads = DTYPES[q.dtype], threads
        if mask is not None:
            mask = mask.expand(b, h, t, s)
            args.mask, args.mask_kind, args.mask_stride[:] = mask.data_ptr(), MASKS[mask.dtype], mask.stride()
        out = torch.full((b, t, h, dv), torch.nan)
        size = self.library.core_workspace(ctypes.byref(args))
        space = torch.full((size + 64 + GUARD,), 255, dtype=torch.uint8)  # as floats: NaN
        start = -space.data_ptr() % 64
        args.out, args.workspace = out.data_ptr(), space.data_ptr() + start
        keep = (q, k, v, mask)

        def call() -> Tensor:
            self.library.core_run(ctypes.byref(args))
            assert keep
            assert not guard or bool((space[start + size :][:GUARD] == 255).all()), "written behind the workspace"
            return out

        return call


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decode(core: Core, name: str, length: int, threads: int, rounds: int) -> dict[str, Any]:
    """One query against caches of `length` keys, 256 MiB of them or more."""
    heads, kv_heads, width = SHAPES[name]
    size = 2 * kv_heads * length * width * 2
    count = max(2, -(-(256 << 20) // size))
    caches = torch.randn(count, 2, 1, kv_heads, length, width, dtype=torch.bfloat16)
    q = torch.randn(1, heads, 1, width, dtype=torch.bfloat16)
    calls = [core.prepare(q, k, v, scale=width**-0.5, threads=threads, guard=False) for k, v in caches]
    buffer = torch.zeros(256 << 20, dtype=torch.uint8)
    times, probes = [], []
    for _ in range(rounds):
        probes.append(seconds(lambda: core.read(buffer, threads)))
        times.append(seconds(lambda: [call() for call in calls]))
    rate, probe = count * size / statistics.median(times) / 1e9, buffer.numel() / statistics.median(probes) / 1e9
    best = {"best_kv_gb_s": count * size / min(times) / 1e9, "best_read_gb_s": buffer.numel() / min(probes) / 1e9}
    return {"kind": "decode", "shape": name, "keys": length, "kv_gb_s": rate, "read_gb_s": probe, **best}


def prefill(core: Core, name: str, length: int, threads: int, rounds: int) -> dict[str, Any]:
    """Causal self-attention of `length` tokens; only the FLOP below the diagonal count."""
    heads, kv_heads, width = SHAPES[name]
    q, k, v = (torch.randn(1, h, length, width, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    call = core.prepare(q, k, v, causal=True, scale=width**-0.5, threads=threads)
    call()
    times = [seconds(call) for _ in range(rounds)]
    work = 4 * heads * width * length * (length + 1) / 2
    rates = {"gflop_s": work / statistics.median(times) / 1e9, "best_gflop_s": work / min(times) / 1e9}
    return {"kind": "prefill", "shape": name, "keys": length, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", default="", choices=("", *ISAS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        core = Core(Path(folder))
        if not core.set_isa(args.isa):
            parser.error(f"this CPU does not run {args.isa}")
        results = [
            measure(core, name, length, args.threads, args.rounds)
            for measure in (decode, prefill)
            for name in SHAPES
            for length in LENGTHS
        ]
    text = json.dumps({"isa": args.isa or "best", "threads": args.threads, "results": results}, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
