"""Measure the projections alone: GB/s of weights for few tokens, GOPS for many, next to what the machine can do.

    python benchmarks/kernels.py                                  # JSON to stdout, all shapes
    python benchmarks/kernels.py --only 1b --isa avx2 --threads 1 --output kernels.json

Weights are cold: each call takes the next of many copies, COLD_BYTES in all, so that they come from memory. The
two ceilings, a read of memory in order and int8 products from registers, are timed between the shapes, in the
same process and with the same instruction set. A shared machine disturbs every number downwards, so the best
tenth of the calls is what the code can do and the median is what it did; both are in the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicorn_backend import measure
from unicorn_backend.assets import load_native
from unicorn_backend.layouts import GROUP, ROWS

COLD_BYTES = 192 << 20  # six times a 32 MB last-level cache
PROBE_BYTES = 8 << 20  # one reading of the probe; as short as a kernel, so that other processes disturb both alike
PEAK_STEPS = 20_000
TOKENS = (1, 2, 4, 8, 64, 512)
HEAD_TOKENS = (1, 4, 8)  # the output head only ever sees a few

Shape = tuple[int, int, str]  # N, K, scheme
Call = Callable[[Tensor, list[list[Tensor]]], object]

# Name: (N, K, tokens, scheme).
LINEARS = {
    "1b.down": (1152, 6912, TOKENS, "w4g32"),
    "1b.gate": (6912, 1152, TOKENS, "w4g32"),
    "1b.q": (1024, 1152, TOKENS, "w8c"),
    "1b.head": (262144, 1152, HEAD_TOKENS, "w8a"),
    "4b.down": (2560, 10240, TOKENS, "w4g32"),
    "4b.gate": (10240, 2560, TOKENS, "w4g32"),
    "4b.q": (2048, 2560, TOKENS, "w8c"),
}
# Name: (width, FFN width).
FFNS = {"1b.ffn": (1152, 6912), "4b.ffn": (2560, 10240), "e2b.ffn": (2048, 8192), "e2b.sparse_ffn": (2048, 8192)}
CUTOFF = 1.6448536  # standard deviations above the mean: Gemma 3n's gates, 5 % of which are open
# Name: (width, query rows, key rows, head width).
QKVS = {"1b.qkv": (1152, 1024, 256, 256), "4b.qkv": (2560, 2048, 1024, 256)}


def weight(n: int, k: int, scheme: str) -> list[Tensor]:
    """Packed random bytes: speed does not depend on the values."""
    n16, k32 = -(-n // ROWS), -(-k // GROUP)
    if scheme == "w4g32":
        return [torch.randint(0, 256, (n16, k32, 4, 16, 4), dtype=torch.uint8), torch.rand(n16, k32, 16).half() / 100]
    packed = [torch.randint(0, 256, (n16, k32, 8, 16, 4), dtype=torch.uint8), torch.rand(n16, 16) / 1000]
    return packed if scheme == "w8c" else [*packed, torch.randint(0, 256, (n16, 16), dtype=torch.uint8)]


def size_of(weights: list[list[Tensor]]) -> int:
    """Bytes that one call reads."""
    return sum(tensor.nbytes for packed in weights for tensor in packed)


def seconds(call: Callable[[], object], budget: float) -> dict[str, float]:
    """Time of one call: the best tenth and the median of as many as fit the budget (at least five)."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    times.sort()
    return {"best_s": times[len(times) // 10], "median_s": times[len(times) // 2], "calls": len(times)}


def ceilings(probe: Tensor, budget: float) -> dict[str, float]:
    """GB/s of reading cold memory in order and GOPS of int8 products from registers, right now."""
    slices = itertools.cycle(probe.split(PROBE_BYTES // probe.element_size()))
    read = seconds(lambda: torch.ops.unicorn.read_bytes(next(slices)), budget)
    done = torch.ops.unicorn.dot_peak(PEAK_STEPS)
    peak = seconds(lambda: torch.ops.unicorn.dot_peak(PEAK_STEPS), budget)
    return {
        "read_gb_s": PROBE_BYTES / read["best_s"] / 1e9,
        "read_median_gb_s": PROBE_BYTES / read["median_s"] / 1e9,
        "int8_gops": 2 * done / peak["best_s"] / 1e9,
    }


def linear_call(n: int) -> Call:
    return lambda x, w: torch.ops.unicorn.linear(x, w[0], None, n)


def ffn_call(k: int, f: int, cutoff: float | None = None) -> Call:
    norm, ops = torch.rand(k).bfloat16(), torch.ops.unicorn
    op, more = (ops.int4_ffn, ()) if cutoff is None else (ops.sparse_ffn, (cutoff,))
    return lambda x, w: op(x, norm, 1e-6, 1.0, *w, [], "gelu_tanh", f, k, norm, 1e-6, 1.0, x, *more)


def qkv_call(k: int, q: int, kv: int, d: int) -> Call:
    norm, head_norm, angles = (
        torch.rand(k).bfloat16(),
        torch.rand(d).bfloat16(),
        torch.ones(1, max(TOKENS), d).bfloat16(),
    )

    def call(x: Tensor, w: list[list[Tensor]]) -> object:
        cos = angles[:, : x.shape[0]]
        heads = (head_norm, head_norm, 1e-6, 1.0, cos, cos, q // d, kv // d, d, False, False)
        return torch.ops.unicorn.int8_qkv(x[None], norm, 1e-6, 1.0, *w, [], *heads)

    return call


def cases() -> Iterator[tuple[str, str, list[Shape], tuple[int, ...], Call]]:
    """(name, scheme, weights, tokens, call of x and weights)."""
    for name, (n, k, tokens, scheme) in LINEARS.items():
        yield name, scheme, [(n, k, scheme)], tokens, linear_call(n)
    for name, (k, f) in FFNS.items():
        cutoff = CUTOFF if name.endswith("sparse_ffn") else None
        yield name, "w4g32", [(f, k, "w4g32"), (f, k, "w4g32"), (k, f, "w4g32")], TOKENS, ffn_call(k, f, cutoff)
    for name, (k, q, kv, d) in QKVS.items():
        yield name, "w8c", [(q, k, "w8c"), (kv, k, "w8c"), (kv, k, "w8c")], TOKENS, qkv_call(k, q, kv, d)


def run(only: str, budget: float) -> Iterator[dict[str, Any]]:
    """One row per shape and number of tokens, with the ceilings measured just before."""
    probe = torch.ones(COLD_BYTES // 4)
    for name, scheme, shapes, tokens, call in cases():
        if not name.startswith(only):
            continue
        size = size_of([weight(*shape) for shape in shapes])
        copies = [[weight(*shape) for shape in shapes] for _ in range(max(1, -(-COLD_BYTES // size)))]
        limits = ceilings(probe, budget)
        for m in tokens:
            x = torch.randn(m, shapes[0][1]).bfloat16()
            turn = itertools.cycle(copies)
            timing = seconds(lambda x=x, turn=turn, call=call: call(x, next(turn)), budget)
            operations = 2 * m * sum(n * k for n, k, _ in shapes)
            yield {
                "name": name,
                "scheme": scheme,
                "tokens": m,
                **timing,
                "gb_s": size / timing["best_s"] / 1e9,
                "gops": operations / timing["best_s"] / 1e9,
                "share_of_read": size / timing["best_s"] / 1e9 / limits["read_gb_s"],
                "share_of_int8": operations / timing["best_s"] / 1e9 / limits["int8_gops"],
                **limits,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="shapes whose name starts with this, for example 1b or 4b.ffn")
    parser.add_argument("--isa", default="", help="avx512amx, avx512vnni, avx2 or portable (default: the best)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="per row")
    parser.add_argument("--output", type=Path, help="JSON file (default: stdout)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    load_native()
    isa = torch.ops.unicorn.set_isa(options.isa)
    rows = list(run(options.only, options.seconds))
    text = json.dumps({"provenance": {**measure.provenance(), "isa_used": isa}, "kernels": rows}, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
