"""Requests at once: tokens per second of all and of each, decoded together and one after another.

Writes benchmarks/results/serving-MODEL.json. In the loop that `unicorn serve` runs, without HTTP: N requests are there
at once, their prompts included in the time. Both ways are measured in turn; numbers are medians over the rounds, the
ratio is the median of the rounds' ratios. No prompt reuses another's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from unicorn_backend import measure, models
from unicorn_backend.generation.batch import ROWS
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Settings

RESULTS = Path(__file__).parent / "results"


def at_once(engine: Engine, clients: int, rows: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Of so many requests: tokens per second of all with their prompts, and of the median one after its first token."""
    engine.prefixes.clear()
    ids = models.sample_ids(clients * prompt)[0].tolist()
    settings = Settings(tokens, ignore_eos=True)
    start = time.perf_counter()
    results = engine.generate_many(((ids[i * prompt :][:prompt], settings) for i in range(clients)), rows)
    seconds = time.perf_counter() - start
    compiled, reused = (sum(getattr(r, name) for r in results) for name in ("compiled", "reused_tokens"))
    assert reused == 0, f"{reused} tokens of prompts were not computed"
    if compiled:
        print(f"{clients} clients, {rows} rows: {compiled} graphs compiled, which the time holds", file=sys.stderr)
    return clients * tokens / seconds, statistics.median(result.tokens_per_second for result in results)


def measured(engine: Engine, clients: int, options: argparse.Namespace) -> dict[str, float]:
    rounds = []
    for index in range(options.rounds):
        one = {}
        for rows in (1, options.rows) if index % 2 == 0 else (options.rows, 1):
            one[rows] = at_once(engine, clients, rows, options.prompt, options.tokens)
        rounds.append(one)
    return {
        "clients": clients,
        "sequential_total_tok_s": statistics.median(one[1][0] for one in rounds),
        "sequential_each_tok_s": statistics.median(one[1][1] for one in rounds),
        "total_tok_s": statistics.median(one[options.rows][0] for one in rounds),
        "each_tok_s": statistics.median(one[options.rows][1] for one in rounds),
        "ratio": statistics.median(one[options.rows][0] / one[1][0] for one in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=ROWS, help="decoded together at most")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    engine = Engine(options.model)
    engine.warm_up(rows=options.rows)
    for clients in (1, max(options.clients)):
        at_once(engine, clients, options.rows, options.prompt, options.tokens)
    result = {
        "model": options.model,
        "rows": [measured(engine, clients, options) for clients in options.clients],
        "batch": options.rows,
        "prompt_tokens": options.prompt,
        "new_tokens": options.tokens,
        "rounds": options.rounds,
        "provenance": measure.provenance(),
    }
    print(json.dumps(result, indent=1))
    if not options.dry_run:
        out = RESULTS / f"serving-{options.model}.json"
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
