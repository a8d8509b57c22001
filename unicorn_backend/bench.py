"""`unicorn bench`: generation speed next to its ceiling and next to what else could have been used.

Systems run interleaved in one process (external ones as child processes in the same rounds); memory
bandwidth is read before and after each run. The result is one JSON object; `report` prints it.
"""

from __future__ import annotations

import copy
import json
import shlex
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import unicorn_backend
from unicorn_backend import measure, models, table
from unicorn_backend.errors import OptionError, UnicornError
from unicorn_backend.integration import screening
from unicorn_backend.integration.prepare import plans_of
from unicorn_backend.integration.screening import Saved
from unicorn_backend.measure import Timing
from unicorn_backend.options import Options
from unicorn_backend.plan import placements

SCHEMA = 1


@dataclass(frozen=True)
class Peer:
    """An external program to run in the same rounds: `llama-bench` of llama.cpp, of a fork of it, or alike."""

    name: str
    command: tuple[str, ...]  # without -m and the model
    model: Path  # a file, or a folder of them

    @classmethod
    def parse(cls, spec: str, gguf: Path | None) -> Peer:
        """From `NAME=PROGRAM [OPTIONS]`; NAME is what the table calls it. `-m` in OPTIONS goes before `gguf`."""
        name, _, line = spec.partition("=")
        command = shlex.split(line)
        if not name or not command or not Path(command[0]).is_file():
            raise OptionError(
                f"--peer: got {spec!r}, expected NAME=PROGRAM [OPTIONS] with PROGRAM an existing llama-bench, "
                "such as 'llama.cpp=./llama-bench'"
            )
        if "-m" in command[1:-1]:
            at = command.index("-m", 1)
            model = Path(command[at + 1])
            del command[at : at + 2]
            if not model.exists():
                raise OptionError(f"--peer: got {spec!r}, expected a model file or folder that exists after -m")
        elif gguf is None or not gguf.is_file():
            raise OptionError(
                f"--gguf: got {str(gguf)!r}, a peer without its own -m needs the path of an existing GGUF file"
            )
        else:
            model = gguf
        return cls(name, tuple(command), model)

    @property
    def model_bytes(self) -> int:
        if self.model.is_file():
            return self.model.stat().st_size
        return sum(path.stat().st_size for path in self.model.rglob("*") if path.is_file())

    @property
    def note(self) -> str:
        """The options and the model, without the folders that only this machine has."""
        options = [Path(option).name if Path(option).exists() else option for option in self.command[1:]]
        return " ".join((*options, self.model.name))

    def run(self, prompt_tokens: int, new_tokens: int) -> Timing:
        sizes = ["-p", str(prompt_tokens), "-n", str(new_tokens), "-t", str(torch.get_num_threads())]
        command = [*self.command, "-m", str(self.model), *sizes, "-r", "1", "-o", "json"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            runs = json.loads(output)
            prefill = next(run["avg_ts"] for run in runs if run["n_prompt"] and not run["n_gen"])
            decode = next(run["avg_ts"] for run in runs if run["n_gen"] and not run["n_prompt"])
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().rpartition("\n")[-1]
            raise UnicornError(f"peer {self.name} ended with exit code {error.returncode}: {last}") from error
        except (json.JSONDecodeError, KeyError, StopIteration) as error:
            raise UnicornError(f"peer {self.name} gave no usable result: {error}") from error
        return Timing(float(prefill), float(decode))


@dataclass(frozen=True)
class Workload:
    """What every system does in a round."""

    model: str = "tiny"
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)  # of our own compiled model
    contexts: tuple[int, ...] = ()  # further prompt lengths: first token and decode speed at each
    also: tuple[str, ...] = ()  # further recipes of our own


@dataclass(frozen=True)
class System:
    """One column of the comparison. `model` is None for an external program."""

    name: str
    run: Callable[[], Timing]
    model: Any
    weight_bytes: int
    total_bytes: int
    note: str = ""


def bench(work: Workload, *, eager: bool = True, peers: Sequence[Peer] = ()) -> dict[str, Any]:
    """Measure and return the JSON object."""
    options = Options.parse(work.options)
    ids = models.sample_ids(work.prompt_tokens, work.model)
    original = models.load(work.model)
    parameters = sum(p.numel() for p in original.parameters())
    systems = _systems(original, work, ids, eager, peers)
    # Hashing is also the warm-up: afterwards everything is compiled.
    hashes = {s.name: measure.last_logits_hash(s.model, ids, work.new_tokens) for s in systems if s.model is not None}
    compiled = {s.name: s.model for s in systems if s.model is not None}
    for model in compiled.values():
        measure.generate_timed(model, ids, 3)  # what hashing, which sees all logits, does not need
    before = {name: screening.saved(model) for name, model in compiled.items()}
    kv = measure.kv_bytes(original, context=work.prompt_tokens + work.new_tokens // 2)
    runs = measure.interleave({s.name: partial(measure.bracketed, s.run) for s in systems}, work.rounds)
    saved = {name: screening.saved(model) for name, model in compiled.items()}
    rows = [
        _row(s, runs[s.name], kv, hashes.get(s.name), saved.get(s.name, Saved()), before.get(s.name)) for s in systems
    ]
    bandwidths = [gbps for row in rows for gbps in row["bandwidth_gbps"]]
    _add_ratios(rows)
    return {
        "schema": SCHEMA,
        "model": work.model,
        "weights": "random" if work.model in models.CONFIGS else "trained",
        "parameters": parameters,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "rounds": work.rounds,
        "recipe": options.recipe or "default",
        "devices": list(options.devices),
        "policy": options.policy,
        "placements": placements(plans_of(systems[0].model._orig_mod)),
        "bandwidth": {
            "lowest_gbps": min(bandwidths),
            "highest_gbps": max(bandwidths),
            "ceiling_gbps": statistics.median(bandwidths),
        },
        "systems": rows,
        "contexts": [_at_context(systems, work, tokens) for tokens in work.contexts],
        "bugs": [f"{row['name']}: {row['bandwidth_share']:.0%} of bandwidth" for row in rows if row["is_bug"]],
        "provenance": measure.provenance(),
    }


def _at_context(systems: Sequence[System], work: Workload, tokens: int) -> dict[str, Any]:
    """First-token time and decode speed of the Hugging Face systems after a prompt of `tokens`."""
    ids = models.sample_ids(tokens, work.model)
    runs = {
        s.name: partial(measure.generate_timed, s.model, ids, work.new_tokens) for s in systems if s.model is not None
    }
    timings = measure.interleave(runs, work.rounds)
    rows = [
        {
            "name": name,
            "first_token_s": statistics.median(tokens / t.prefill_tok_s for t in times),
            "decode_tok_s": statistics.median(t.decode_tok_s for t in times),
        }
        for name, times in timings.items()
    ]
    return {"prompt_tokens": tokens, "systems": rows}


def _systems(original: Any, work: Workload, ids: torch.Tensor, eager: bool, peers: Sequence[Peer]) -> list[System]:
    """unicorn first, its further recipes, then eager bf16, then the peers."""
    named: dict[str, Any] = {}
    for recipe in (work.options.get("recipe") or "default", *work.also):
        quantized = copy.deepcopy(original) if eager or work.also else original
        unicorn_backend.quantize(quantized, recipe=recipe)
        name = "unicorn" if not named else f"unicorn, {recipe}"
        named[name] = torch.compile(quantized, backend="unicorn", options={**work.options, "recipe": recipe})
    if eager:
        named["eager bf16"] = original
    systems = [_hugging_face(name, model, ids, work) for name, model in named.items()]
    for peer in peers:
        size = peer.model_bytes
        run = partial(peer.run, work.prompt_tokens, work.new_tokens)
        systems.append(System(peer.name, run, None, size, size, note=peer.note))
    return systems


def _hugging_face(name: str, model: Any, ids: torch.Tensor, work: Workload) -> System:
    return System(
        name=name,
        run=lambda: measure.generate_timed(model, ids, work.new_tokens),
        model=model,
        weight_bytes=measure.weight_bytes(model),
        total_bytes=measure.model_bytes(model),
    )


def _row(
    system: System,
    runs: Sequence[tuple[Timing, float]],
    kv: int,
    hashed: str | None,
    saved: Saved,
    before: Saved | None,
) -> dict[str, Any]:
    """One system's numbers; its shares of the bandwidth are those of each run, by what was read around it.

    saved, before: what was not read of the head, after the runs and before them.
    """
    decode, bandwidths = [timing.decode_tok_s for timing, _ in runs], [gbps for _, gbps in runs]
    weights = system.weight_bytes - saved.per_call(before)
    bytes_per_token = weights + kv
    share = statistics.median(
        bytes_per_token * speed / 1e9 / gbps for speed, gbps in zip(decode, bandwidths, strict=True)
    )
    in_cache = system.weight_bytes < measure.last_level_cache_bytes()
    return {
        "name": system.name,
        "note": system.note,
        "model_bytes": system.total_bytes + saved.copied,
        "bytes_per_token": {"weights": weights, "kv": kv},
        "prefill_tok_s": _spread([timing.prefill_tok_s for timing, _ in runs]),
        "decode_tok_s": _spread(decode),
        "gbps": bytes_per_token * statistics.median(decode) / 1e9,
        "bandwidth_gbps": bandwidths,
        "bandwidth_share": share,
        "ceiling_tok_s": statistics.median(bandwidths) * 1e9 / bytes_per_token,
        "in_cache": in_cache,
        "is_bug": not in_cache and share > measure.BUG_SHARE,
        "last_logits_sha256": hashed,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "best": max(values), "all": list(values)}


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each row's speed over eager bf16's, as the median of the per-round ratios."""
    base = next((row for row in rows if row["name"] == "eager bf16"), None)
    for row in rows:
        for phase in ("decode", "prefill"):
            key = f"{phase}_tok_s"
            ratio = measure.paired_ratio(row[key]["all"], base[key]["all"]) if base else None
            row[f"{phase}_ratio"] = ratio


def report(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    header = ("", "decode tok/s", "vs eager", "prefill tok/s", "vs eager", "MB/token", "GB/s", "of bandwidth")
    band = result["bandwidth"]
    lines = [
        f"{result['model']} ({result['weights']} weights), prompt {result['prompt_tokens']}, "
        f"{result['new_tokens']} new tokens, {result['rounds']} interleaved rounds, medians",
        f"memory read between the runs: {band['lowest_gbps']:.1f} to {band['highest_gbps']:.1f} GB/s",
        "",
        table.text(header, [cells(row) for row in result["systems"]]),
    ]
    if any(row["in_cache"] for row in result["systems"]):
        lines.append("(c) the weights fit in the last-level cache, so the share of memory bandwidth says little")
    if result.get("contexts"):
        at_context = [
            (str(at["prompt_tokens"]), row["name"], f"{row['first_token_s'] * 1e3:.0f}", f"{row['decode_tok_s']:.1f}")
            for at in result["contexts"]
            for row in at["systems"]
        ]
        lines += ["", table.text(("after a prompt of", "", "first token, ms", "decode tok/s"), at_context)]
    lines += result.get("placements", ())
    lines += [f"BUG: {bug}; more than the memory can deliver" for bug in result["bugs"]]
    return "\n".join(lines)


def load_result(path: Path) -> dict[str, Any]:
    """A JSON file that `unicorn bench --output` wrote."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["schema"] == SCHEMA and result["systems"]:
            return dict(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--compare: {path} is no result of `unicorn bench --output`: {error!r}") from error
    raise OptionError(f"--compare: {path} has schema {result['schema']!r}, this version reads {SCHEMA}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What changed between two results: ratios new / old per system and phase, and why they may not be comparable."""
    before = {row["name"]: row for row in old["systems"]}
    rows = []
    for row in new["systems"]:
        if row["name"] in before:
            ratios = {
                phase: row[f"{phase}_tok_s"]["median"] / before[row["name"]][f"{phase}_tok_s"]["median"]
                for phase in ("decode", "prefill")
            }
            hashes = {before[row["name"]]["last_logits_sha256"], row["last_logits_sha256"]}
            rows.append({"name": row["name"], **ratios, "same_logits": len(hashes) == 1})
    keys = ("model", "recipe", "prompt_tokens", "new_tokens")
    differs = [f"{key}: {old[key]} and {new[key]}" for key in keys if old[key] != new[key]]
    for key, usual in (("devices", ["cpu"]), ("policy", "speed")):
        a, b = old.get(key, usual), new.get(key, usual)
        differs += [f"{key}: {a} and {b}"] * (a != b)
    for key in ("cpu", "threads", "torch", "transformers"):
        a, b = old["provenance"].get(key), new["provenance"].get(key)
        differs += [f"{key}: {a} and {b}"] * (a != b)
    bandwidth = new["bandwidth"]["ceiling_gbps"] / old["bandwidth"]["ceiling_gbps"]
    return {"systems": rows, "bandwidth": bandwidth, "differs": differs}


def compare_report(result: dict[str, Any]) -> str:
    """`compare` for people."""
    rows = [
        (r["name"], f"{r['decode']:.2f}x", f"{r['prefill']:.2f}x", "the same" if r["same_logits"] else "DIFFERENT")
        for r in result["systems"]
    ]
    lines = [table.text(("new / old", "decode", "prefill", "last logits"), rows)]
    lines.append(f"memory bandwidth {result['bandwidth']:.2f}x: speeds bounded by it move alike")
    return "\n".join(lines + [f"not the same {line}" for line in result["differs"]])


def cells(row: dict[str, Any]) -> list[str]:
    """One system's cells, in the order of `report`'s header."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    return [
        row["name"],
        f"{row['decode_tok_s']['median']:.1f}",
        ratio(row["decode_ratio"]),
        f"{row['prefill_tok_s']['median']:.0f}",
        ratio(row["prefill_ratio"]),
        f"{sum(row['bytes_per_token'].values()) / 1e6:.1f}",
        f"{row['gbps']:.1f}",
        f"{row['bandwidth_share']:.0%}" + (" (c)" if row["in_cache"] else ""),
    ]
