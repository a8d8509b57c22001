"""Screening of a head's rows on random weights and activations, which is the hard case: no score stands out.

    python benchmarks/screening.py [--rows 262144] [--rounds 5] [--output benchmarks/results/screening.json]

For each width and number of best scores: the part of the head that is read, and the time against reading it whole, in
pairs, with cold weights. Every result is checked: the best scores are those of the whole head, to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicorn_backend import measure
from unicorn_backend.assets import load_native
from unicorn_backend.quantize.schemes import quantize_weight

WIDTHS = (1152, 2560, 5376)  # Gemma 3 1B, 4B, 27B
BEST = (1, 64)
CALLS = 16  # of a round
COLD_BYTES = 256 << 20  # read between calls


def head(rows: int, k: int) -> list[Tensor]:
    """Normally distributed weights as w8a, in huge pages."""
    tiles = [quantize_weight(torch.randn(min(4096, rows - begin), k), "w8a") for begin in range(0, rows, 4096)]
    packed = [torch.cat(parts) for parts in zip(*tiles, strict=True)]
    arena = torch.classes.unicorn.Arena([part.nbytes for part in packed])
    return [arena.place(part) for part in packed]


def bind(weights: list[Tensor], rows: int) -> Any:
    """A graph of the head alone, with its weights."""
    program = torch.classes.unicorn.Program(4)
    out = program.call(
        "unicorn::linear", "", [-1, 3, -1, -1], [0, 1, 2, 3, program.constant(None), program.constant(rows)]
    )
    program.outputs([out])
    return program.bind([1, 2, 3], weights, [])


def check(scores: Tensor, whole: Tensor, best: int) -> None:
    """Raises if one of the `best` largest is not what it is in `whole`."""
    among = whole >= whole.float().flatten().topk(best).values[-1]
    if not torch.equal(scores[among], whole[among]):
        raise AssertionError("a score among the best is not that of the whole head")


def case(rows: int, k: int, best: int, rounds: int) -> dict[str, Any]:
    weights = head(rows, k)
    bound = bind(weights, rows)
    screen = torch.classes.unicorn.Screen(weights)
    bound.screen(screen)
    cold = torch.zeros(COLD_BYTES // 4)
    pairs: list[tuple[float, float]] = []
    counters: list[tuple[int, int]] = []
    for number in range(rounds + 1):  # the first one warms up, and decides between five and six bits
        times: tuple[list[float], list[float]] = ([], [])
        before = screen.read()
        for _ in range(CALLS):
            x = torch.randn(1, 1, k).bfloat16()
            results = []
            for which, wanted in enumerate((0, best)):
                cold.add_(1)
                start = time.perf_counter()
                results.append(bound.run([x], wanted)[0])
                times[which].append(time.perf_counter() - start)
            check(results[1], results[0], best)
        if number:
            pairs.append((statistics.median(times[0]), statistics.median(times[1])))
            after = screen.read()
            counters.append((after[0] - before[0], after[1] - before[1]))
    read, calls = (sum(values) for values in zip(*counters, strict=True))
    return {
        "columns": k,
        "best": best,
        "head_bytes": weights[0].nbytes,
        "copied_bytes": screen.bytes(),
        "read_share": read / calls / weights[0].nbytes,
        "whole_ms": statistics.median(whole for whole, _ in pairs) * 1e3,
        "screened_ms": statistics.median(screened for _, screened in pairs) * 1e3,
        "speedup": statistics.median(whole / screened for whole, screened in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=262144)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "screening.json")
    args = parser.parse_args()
    load_native()
    torch.manual_seed(0)
    before = measure.read_bandwidth()
    with torch.no_grad():
        cases = [case(args.rows, k, best, args.rounds) for k in WIDTHS for best in BEST]
    result = {
        "rows": args.rows,
        "rounds": args.rounds,
        "calls_per_round": CALLS,
        "bandwidth_gbps": [before, measure.read_bandwidth()],
        "cases": cases,
        "provenance": measure.provenance(),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
