"""Speculative decoding: tokens per second with and without it, on repeated and on fresh text.

Writes benchmarks/results/speculation-MODEL.json. Pairs are interleaved; the ratio is the median of the pairs' ratios.
With --assistant, of drafts from an assistant model alone (no drafts from repeated text), in assistant-tiny.json: of the
embedded model with layers added that change nothing, so that it takes longer and says the same, by the embedded model
whole and cut down. That measures the mechanism between two ends, not what a real pair of models gains.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unicorn_backend import measure, models
from unicorn_backend.generation.assistant import Assistant, AssistedDrafter
from unicorn_backend.generation.drafting import Drafter
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.request import Settings

RESULTS = Path(__file__).parent / "results"


def measured(engine: Engine, ids: list[int], settings: dict, rounds: int) -> dict:
    rows = []
    for index in range(rounds):
        pair = {}
        for speculate in (False, True) if index % 2 == 0 else (True, False):
            engine.prefixes.clear()
            if engine.assistant is not None:
                engine.assistant.prefixes.clear()
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


class AssistantOnly(Engine):
    """Drafts of the assistant where there is one, and none from repeated text."""

    def drafter(self, settings: Settings) -> AssistedDrafter | Drafter:
        lookup = Drafter(max_draft=0, costs=self._costs)
        return AssistedDrafter(self.assistant, lookup, self.config.vocab_size) if self.assistant else lookup


def resized(layers: int) -> Any:
    """The embedded model with its first layers only, or with more, whose output is zero."""
    config = AutoConfig.from_pretrained(models.TINY, num_hidden_layers=layers)
    config.layer_types = (config.layer_types * layers)[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    known = models.load("tiny").state_dict()
    for name, value in model.state_dict().items():
        if name in known:
            value.copy_(known[name])
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()
    return model.eval()


def assisted(tokens: int, rounds: int) -> dict:
    """Each assistant with a model of 36 layers, 6 of which compute something."""
    text = models.sample_ids(400)[0].tolist()
    common = {"max_new_tokens": tokens, "ignore_eos": True}
    engine = AssistantOnly("tiny", model=resized(36))
    rows = {}
    for name, layers in {"agrees": 6, "cut to 5 layers": 5, "cut to 2 layers": 2}.items():
        engine.assistant = Assistant("tiny", None, engine.tokenizer, model=resized(layers))
        engine.warm_up(speculate=True)
        engine.generate(text[:20], Settings(**{**common, "max_new_tokens": 40}, speculate=True))
        for kind, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
            rows[f"{name}, {kind}"] = measured(engine, text[:100], {**common, "temperature": temperature}, rounds)
    return {"model": "tiny with 30 layers added that change nothing", **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--assistant", action="store_true")
    arguments = parser.parse_args()
    if arguments.assistant:
        result = {**assisted(arguments.tokens, arguments.rounds), "provenance": measure.provenance()}
        (RESULTS / "assistant-tiny.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=1))
        return
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
