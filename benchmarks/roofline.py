"""Draw decode results against memory bandwidth: docs/roofline-NAME.png from benchmarks/results/decode-NAME.json.

    python benchmarks/roofline.py gemma3-1b

Each system is a point: bytes it reads per token, tokens per second (median, bar from slowest to fastest round).
The line is the most that the bandwidth measured in the same run allows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]


def draw(result: dict[str, Any], path: Path) -> None:
    sizes = [sum(row["bytes_per_token"].values()) for row in result["systems"]]
    ceiling = result["bandwidth"]["ceiling_gbps"]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    span = [0.8 * min(sizes), 1.2 * max(sizes)]
    grid = [span[0] * (span[1] / span[0]) ** (i / 99) for i in range(100)]
    axes.plot([x / 1e6 for x in grid], [ceiling * 1e9 / x for x in grid], color="0.4")
    axes.annotate(
        f"{ceiling:.1f} GB/s, measured",
        (grid[60] / 1e6, ceiling * 1e9 / grid[60]),
        xytext=(6, 6),
        textcoords="offset points",
    )
    for row, size in zip(result["systems"], sizes, strict=True):
        speed = row["decode_tok_s"]
        bar = [[speed["median"] - min(speed["all"])], [speed["best"] - speed["median"]]]
        axes.errorbar(size / 1e6, speed["median"], yerr=bar, fmt="o", capsize=3)
        label = f"{row['name']} {row['bandwidth_share']:.0%}"
        axes.annotate(label, (size / 1e6, speed["median"]), xytext=(8, -4), textcoords="offset points")
    where = result["provenance"]
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="MB read per token",
        ylabel="decode, tokens per second",
        title=f"{result['model']}, batch 1, {where['cpu']}, {where['threads']} threads",
    )
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="+", help="as in benchmarks/results/decode-<name>.json")
    for name in parser.parse_args().name:
        result = json.loads((ROOT / "benchmarks" / "results" / f"decode-{name}.json").read_text(encoding="utf-8"))
        path = ROOT / "docs" / f"roofline-{name}.png"
        draw(result, path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
