"""Write benchmarks/results/quantize-MODEL.json: time, throughput and memory of `unicorn quantize`, disk to disk.

On random weights of the true shapes, beside what the disk allows: copying the input and writing as many bytes
as the output, flushed. Each runs in its own process, alternating, with the input in the page cache or not as
the system decides; the medians are kept.

    python benchmarks/quantize.py --model gemma3-1b --folder /some/disk --rounds 3
    python benchmarks/quantize.py --model gemma3-1b --compute    # no disk: packing and measuring noise; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from unicorn_backend import measure
from unicorn_backend.formats.target import packed_with_noise
from unicorn_backend.layouts import ROWS
from unicorn_backend.models.random import CONFIGS, config, random_model
from unicorn_backend.quantize.schemes import ensure_kernels
from unicorn_backend.quantize.skeleton import skeleton
from unicorn_backend.quantize.stream import BLOCK_BYTES

RESULTS = Path(__file__).parent / "results"
MEASURED = """
import json, re, resource, sys, time
from pathlib import Path
from unicorn_backend.quantize.schemes import ensure_kernels
from unicorn_backend.quantize import stream
from unicorn_backend import quantize_checkpoint
ensure_kernels()
def peak():  # ru_maxrss would count the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
idle = peak()
start = time.perf_counter()
result = quantize_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], progress=False)
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "idle_bytes": idle, "peak_bytes": peak(),
                  "cpu_seconds": used.ru_utime + used.ru_stime, "totals": result["totals"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CONFIGS), default="gemma3-1b")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; cleaned up")
    parser.add_argument("--compute", action="store_true", help="only what the cores do, in memory; writes no file")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.compute:
        print(json.dumps(compute(arguments.model, arguments.recipe, arguments.rounds), indent=1))
        return
    if arguments.folder is None:
        parser.error("--folder or --compute is needed")
    work = arguments.folder / "unicorn-quantize-benchmark"
    try:
        source = work / arguments.model
        random_model(arguments.model).save_pretrained(source, max_shard_size="5GB")
        rows = [_round(source, work, arguments.recipe) for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "schema": 1,
        "model": arguments.model,
        "recipe": arguments.recipe,
        "medians": {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "totals"},
        "totals": rows[0]["totals"],
        "rounds": rows,
        "provenance": measure.provenance(),
    }
    path = RESULTS / f"quantize-{arguments.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["medians"], indent=1))


def compute(model: str, recipe: str, rounds: int) -> dict[str, Any]:
    """GB/s of bf16 that are packed and whose noise is measured, each core a block at a time as `quantize_checkpoint`
    does, on random blocks of the model's shapes that lie in memory."""
    whole = skeleton(config(model), torch.bfloat16, recipe, None)
    blocks: list[tuple[int, int, str]] = []
    for name, scheme in whole.schemes.items():
        if whole.tied_to(name) is None:
            n, k = whole.state[name].shape
            step = BLOCK_BYTES // (ROWS * k * 2) * ROWS
            blocks += [(min(step, n - first), k, scheme) for first in range(0, n, step)]
    rows = {k: torch.randn(max(n for n, other, _ in blocks if other == k), k).bfloat16() for _, k, _ in blocks}
    ensure_kernels()
    threads, seconds = torch.get_num_threads(), []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as cores:
        for _ in range(rounds + 1):  # the first one warms up
            start = time.perf_counter()
            list(cores.map(lambda block: packed_with_noise(rows[block[1]][: block[0]], block[2], None), blocks))
            seconds.append(time.perf_counter() - start)
    gigabytes = sum(n * k * 2 for n, k, _ in blocks) / 1e9
    median = statistics.median(seconds[1:])
    return {
        "model": model,
        "recipe": recipe,
        "gigabytes": round(gigabytes, 3),
        "threads": threads,
        "seconds": [round(value, 3) for value in seconds[1:]],
        "gb_per_s": round(gigabytes / median, 3),
        "gb_per_s_per_core_pair": round(gigabytes / median * 2 / threads, 3),
        "cpu": measure.provenance()["cpu"],
    }


def _round(source: Path, work: Path, recipe: str) -> dict[str, Any]:
    target = work / "out"
    command = [sys.executable, "-c", MEASURED, str(source), str(target), recipe]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(run.stdout)
    files = sorted(target.glob("*.safetensors"))
    row["disk_seconds"] = _copy(sorted(source.glob("*.safetensors")), work / "copy") + _copy(files, work / "written")
    for name in ("out", "copy", "written"):
        shutil.rmtree(work / name)
    before = row["totals"]["bytes_before"]
    row["gb_per_s"] = before / row["seconds"] / 1e9
    row["over_disk"] = row["seconds"] / row["disk_seconds"]
    row["above_idle_bytes"] = row["peak_bytes"] - row["idle_bytes"]
    return row


def _copy(files: list[Path], folder: Path) -> float:
    """Seconds to copy files by reading and writing them, flushed to the disk."""
    folder.mkdir()
    start = time.perf_counter()
    for path in files:
        with open(path, "rb") as source, open(folder / path.name, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            os.fsync(target.fileno())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
