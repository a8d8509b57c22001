"""Speculative decoding by prompt lookup: tokens per second with and without it, on repeated and on fresh text.

Writes benchmarks/results/speculation-MODEL.json. Pairs are interleaved; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from unicorn_backend import measure, models
from unicorn_backend.generation.engine import Engine, Settings

RESULTS = Path(__file__).parent / "results"


def measured(engine: Engine, ids: list[int], settings: dict, rounds: int) -> dict:
    rows = []
    for index in range(rounds):
        pair = {}
        for speculate in (False, True) if index % 2 == 0 else (True, False):
            engine.prefixes.clear()
            pair[speculate] = engine.generate(ids, Settings(**settings, seed=index, speculate=speculate))
        assert pair[True].ids == pair[False].ids, "speculation changed the text"
        rows.append(pair)
    return {
        "plain_tok_s": statistics.median(p[False].tokens_per_second for p in rows),
        "speculative_tok_s": statistics.median(p[True].tokens_per_second for p in rows),
        "ratio": statistics.median(p[True].tokens_per_second / p[False].tokens_per_second for p in rows),
        "drafted": sum(p[True].drafted for p in rows),
        "accepted": sum(p[True].accepted for p in rows),
        "rounds": rounds,
        **{k: v for k, v in settings.items() if k != "ignore_eos"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    engine = Engine(arguments.model)
    engine.warm_up(speculate=True)
    text = models.sample_ids(400)[0].tolist()
    common = {"max_new_tokens": arguments.tokens, "ignore_eos": True}
    result = {
        "model": arguments.model,
        "repetitive": measured(engine, text[:100] * 3, {**common, "temperature": 0.0}, arguments.rounds),
        "fresh": measured(engine, text[:300], {**common, "temperature": 1.0}, arguments.rounds),
        "provenance": measure.provenance(),
    }
    out = RESULTS / f"speculation-{arguments.model}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind in ("repetitive", "fresh"):
        print(kind, {k: v for k, v in result[kind].items() if k != "provenance"})


if __name__ == "__main__":
    main()
