"""Decode with more weights than RAM has room for: what a token costs when a part of them comes from the disk.

    unicorn quantize MODEL -o packed
    sudo systemd-run --scope -p MemoryMax=2G .venv/bin/python benchmarks/disk.py packed

Run it under a memory limit that the model exceeds. Processes with and without reading ahead run in turn; without, the
kernel reads what faults ask for, and what its own read-ahead adds. Each starts with the file dropped from memory.
Writes benchmarks/results/disk-NAME.json and prints it as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def evict(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_gb_s(file: Path) -> float:
    """Of reading up to 2 GB of it from its start, cold, 8 MB at once."""
    evict(file)
    buffer, done, start = bytearray(8 << 20), 0, time.perf_counter()
    with open(file, "rb", buffering=0) as opened:
        while done < 2 << 30 and (count := opened.readinto(buffer)):
            done += count
    return done / (time.perf_counter() - start) / 1e9


def read_bytes() -> int:
    """That this process had the disk read."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def child(folder: Path, ahead: bool, tokens: int) -> dict[str, Any]:
    """What a token takes in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from unicorn_backend import measure
    from unicorn_backend.integration import prepare
    from unicorn_backend.quantize import memory

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    if not ahead:
        memory._leave = lambda tensor, passing: tensor  # no program is told that these are in a file
    placement = memory.into_huge_pages(model)
    prepare.into_huge_pages = lambda _: memory.Placement(0, 0)  # they have their places
    model = torch.compile(model, backend="unicorn")
    ids = torch.ones(1, 16, dtype=torch.long)
    settings = {"do_sample": False, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=3, min_new_tokens=3, **settings)
    before, start = read_bytes(), time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
    seconds = time.perf_counter() - start
    return {
        "ahead": ahead,
        "in_file_mb": placement.left / 1e6,
        "token_ms": 1e3 * seconds / tokens,
        "read_mb_per_token": (read_bytes() - before) / tokens / 1e6,
        "ram_limit_mb": measure.ram()[0] / 1e6,
        "provenance": measure.provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a packed model")
    parser.add_argument("--tokens", type=int, default=12, help="per process, the prompt's call included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["0", "1"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT" + json.dumps(child(arguments.folder, arguments.child == "1", arguments.tokens)))
        return
    file = arguments.folder / "model.safetensors"
    device = os.stat(file).st_dev
    ahead_kb = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    ceilings, runs = [], []
    for turn in range(2 * arguments.rounds):
        ceilings.append(read_gb_s(file))
        evict(file)
        command = [sys.executable, __file__, str(arguments.folder), "--tokens", str(arguments.tokens)]
        said = subprocess.run([*command, "--child", str(turn % 2)], capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(said.split("RESULT")[-1]))
        print({k: v for k, v in runs[-1].items() if k != "provenance"}, file=sys.stderr, flush=True)
    names = ("in_file_mb", "token_ms", "read_mb_per_token")
    rows = [
        {"ahead": ahead, **{n: statistics.median(r[n] for r in runs if r["ahead"] == ahead) for n in names}}
        for ahead in (False, True)
    ]
    result = {
        "model": arguments.folder.name,
        "rounds": arguments.rounds,
        "ram_limit_mb": runs[0]["ram_limit_mb"],
        "disk_read_gb_s": ceilings,
        "kernel_read_ahead_kb": int(ahead_kb.read_text()) if ahead_kb.exists() else None,
        "rows": rows,
        "provenance": runs[0]["provenance"],
    }
    out = RESULTS / f"disk-{arguments.folder.name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    import tables

    print(tables.disk(result))


if __name__ == "__main__":
    main()
