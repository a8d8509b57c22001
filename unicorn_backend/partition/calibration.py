"""Measuring what `cost.py` multiplies with, on this machine, and keeping it in the user's cache directory.

Everything runs as in a compiled graph: a native program of many calls in a row, over weights in huge pages. Between
two uses of the same weight COLD_BYTES of others are read. Files: `calibration/<device>-<hash>.json` in the cache
folder, the hash over what the rates depend on.
"""

from __future__ import annotations

import calendar
import ctypes.util
import dataclasses
import functools
import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from unicorn_backend import __version__, assets, measure
from unicorn_backend.layouts import SCHEMES, empty_packed, packed_bytes
from unicorn_backend.options import cache_folder
from unicorn_backend.partition import cost
from unicorn_backend.partition.cost import Rates, Table
from unicorn_backend.plan import Step
from unicorn_backend.runtime import open_device
from unicorn_backend.table import text as text_table

SCHEMA = 1
DATE = "%Y-%m-%dT%H:%M:%SZ"
COLD_BYTES = 192 << 20  # beyond any laptop's caches
CACHED_BYTES = 4 << 20  # inside any of them
POINT_S = 0.06  # measured per point, at least three runs after one that warms up
LONG_S = 0.2  # what a run takes from which on two are enough, the first included: two Zen 2 cores took 67 s in all
TRACED_RUNS = 12
PLAIN = ("bfloat16",)  # schemes of float weights that models come in
HEADS, WIDTHS, KEYS = 4, (64, 256), 1024  # of attention over one K/V head

Call = tuple[Any, tuple[Any, ...]]  # an op and its arguments


@dataclass(frozen=True)
class Stored:
    """A calibration as it lies on disk. `identity` is what it depends on."""

    identity: dict[str, Any]
    date: str  # ISO 8601, UTC
    seconds: float  # that it took
    rates: dict[str, Any]

    @property
    def age_s(self) -> float:
        return max(time.time() - calendar.timegm(time.strptime(self.date, DATE)), 0.0)


def identity() -> dict[str, Any]:
    """What the CPU's rates depend on."""
    return {"cpu": measure.cpu_name(), "threads": torch.get_num_threads(), "isa": assets.isa(), "version": __version__}


def rates() -> Rates:
    """The CPU's rates for torch's present number of threads: calibrated, or estimated."""
    found = load("cpu", identity())
    return Rates.of_json(found.rates) if found is not None else cost.estimate(torch.get_num_threads(), assets.isa())


def calibrate_cpu(schemes: Sequence[str] = (*SCHEMES, *PLAIN), cold_bytes: int = COLD_BYTES) -> Rates:
    """Measure the CPU: some 30 s with all schemes."""
    assets.load_native()
    pool = _Pool(cold_bytes)
    few = [t for t in cost.TOKENS if t <= cost.FEW]
    with torch.inference_mode():
        bare = _bare_launch_us(pool)
        attention, softmax = _attention(cold_bytes)
        found = Rates(
            f"measured on {time.strftime('%Y-%m-%d', time.gmtime())}",
            torch.get_num_threads(),
            values=_norm_us(512, 2048) / (512 * 2048 / 1e6),
            gathered=_gather_us(512, 2048, pool) / (512 * 2048 / 1e6),
            read_gbps=measure.read_bandwidth(max(cold_bytes, 1 << 20)),
            cold={s: _table(s, cost.TOKENS, cold_bytes, bare, pool) for s in schemes},
            cached={s: _table(s, few, CACHED_BYTES, bare, pool) for s in schemes},
            attention=attention,
            softmax=softmax,
        )
        cold, cached = (
            _launches(layer, size, found, pool) for layer, size in ((BIG, cold_bytes), (SMALL, CACHED_BYTES))
        )
    return dataclasses.replace(found, cold_launch=cold, cached_launch=cached)


@dataclass(frozen=True)
class Result:
    """What `unicorn calibrate` did."""

    seconds: float
    devices: dict[str, dict[str, Any]]  # device -> its rates, or {"skipped": why}
    files: dict[str, str]  # device -> where they are kept; empty with UNICORN_CACHE=0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        cpu = self.devices["cpu"]
        most = max(cost.TOKENS)
        header = ("us per million weights", "1 token", "8 tokens", f"{most} tokens", "GB/s at 1", f"GOPS at {most}")
        rows = []
        for scheme, us in cpu["cold"].items():
            size = packed_bytes(512, 512, scheme) / 512**2 if scheme in SCHEMES else 2.0
            speeds = (f"{1e3 * size / us[1]:.1f}", f"{2e3 * most / us[most]:.0f}")
            rows.append((scheme, f"{us[1]:.1f}", f"{us[8]:.1f}", f"{us[most]:.0f}", *speeds))
        launches = ", ".join(f"{kind} {us:.1f}" for kind, us in cpu["cold_launch"].items())
        lines = [
            f"cpu, {cpu['threads']} threads: memory read {cpu['read_gbps']:.1f} GB/s; "
            f"us beside the weights: {launches}",
            text_table(header, rows),
            *(
                f"{name}: submit {found['submit_us']:.0f} us"
                for name, found in self.devices.items()
                if "submit_us" in found
            ),
            *(f"{name}: {found['skipped']}" for name, found in self.devices.items() if "skipped" in found),
            *(f"{name}: kept in {path}" for name, path in self.files.items()),
        ]
        return "\n".join([*lines, f"{self.seconds:.0f} s"])


def calibrate() -> Result:
    """Measure the devices of this machine and keep the result (not with UNICORN_CACHE=0)."""
    start = time.perf_counter()
    cpu = calibrate_cpu()
    devices: dict[str, Any] = {"cpu": dataclasses.asdict(cpu)}
    path = store("cpu", identity(), time.perf_counter() - start, cpu)
    files = {"cpu": str(path)} if path is not None else {}
    for name, physical in _vulkan_devices().items():
        begun = time.perf_counter()
        found = _calibrate_vulkan(name, physical)
        devices[name] = {"skipped": found} if isinstance(found, str) else dataclasses.asdict(found)
        if not isinstance(found, str):
            from unicorn_backend.runtime.vulkan import cost as vulkan_cost

            path = store("vulkan", vulkan_cost.identity(physical), time.perf_counter() - begun, found)
            files |= {name: str(path)} if path is not None else {}
    npu = open_device("npu")
    note = "its kernels are timed by their self-tests, at the first prompt that they run (docs/npu.md)"
    devices["npu"] = {"skipped": npu if isinstance(npu, str) else note}
    return Result(time.perf_counter() - start, devices, files)


def _vulkan_devices() -> dict[str, Any]:
    """Name -> PhysicalDevice, where there is a binding and a loader."""
    if importlib.util.find_spec("vulkan") is None or ctypes.util.find_library("vulkan") is None:
        return {}
    from unicorn_backend.runtime.vulkan import api, physical

    try:
        return {f"vulkan:{number}": device for number, device in enumerate(physical.devices())}
    except api.VulkanError:  # no driver that works: doctor says more
        return {}


def _calibrate_vulkan(name: str, physical: Any) -> Any:
    """Its rates, or why there are none."""
    if physical.kind == "software":
        return f"{physical.label}: nothing to measure, it is never preferred to the CPU's kernels"
    device = open_device(name)
    if isinstance(device, str):
        return device
    from unicorn_backend.runtime.vulkan import cost as vulkan_cost

    return vulkan_cost.calibrate(device)


# ---- keeping -------------------------------------------------------------------------------------------------------


def file_of(device: str, about: dict[str, Any]) -> Path | None:
    """Where the calibration of a device lies; None where nothing is kept (UNICORN_CACHE=0)."""
    folder = cache_folder()
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "calibration" / f"{device}-{key}.json" if folder is not None else None


def load(device: str, about: dict[str, Any]) -> Stored | None:
    """The calibration of a device that is what `about` says, or None."""
    path = file_of(device, about)
    return _read(path, path.stat().st_mtime_ns) if path is not None and path.is_file() else None


@functools.lru_cache(maxsize=8)
def _read(path: Path, _: int) -> Stored | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Stored(**data["calibration"]) if data["schema"] == SCHEMA else None
    except (ValueError, KeyError, TypeError):  # damaged, or of another version: as if there were none
        return None


def store(device: str, about: dict[str, Any], seconds: float, rates: Any) -> Path | None:
    """Keep rates (a dataclass), replacing older ones. Returns the file; None where nothing is kept."""
    path = file_of(device, about)
    if path is None:
        return None
    for folder in (path.parent.parent, path.parent):  # the compile cache refuses a folder that is open to others
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = Stored(about, time.strftime(DATE, time.gmtime()), round(seconds, 1), dataclasses.asdict(rates))
    work = path.with_suffix(".writing")
    work.write_text(json.dumps({"schema": SCHEMA, "calibration": dataclasses.asdict(kept)}, indent=1) + "\n")
    work.replace(path)
    return path


# ---- products ------------------------------------------------------------------------------------------------------


class _Pool:
    """Bytes in huge pages that weights are cut from, one after the other, so that the next one is the coldest."""

    def __init__(self, size_bytes: int) -> None:
        pattern = torch.randint(0, 64, (1 << 20,), dtype=torch.uint8)  # finite numbers as bf16 too
        source = pattern.repeat(-(-max(size_bytes, 32 << 20) // pattern.numel()))
        self.bytes: Tensor = torch.classes.unicorn.Arena([source.nbytes]).place(source)
        self._at = 0

    def weight(self, n: int, k: int, scheme: str) -> list[Tensor]:
        """A packed weight of whatever bytes come next; the small parts are numbers."""
        parts = empty_packed(n, k, scheme) if scheme in SCHEMES else [torch.empty(n, k, dtype=torch.bfloat16)]
        size = parts[0].nbytes
        self._at = self._at if self._at + size <= self.bytes.nbytes else 0
        first = self.bytes[self._at : self._at + size].view(parts[0].dtype).view(parts[0].shape)
        self._at += -(-size // 4096) * 4096
        return [first, *(p.fill_(1) if p.dtype in (torch.uint8, torch.int8) else p.fill_(2**-10) for p in parts[1:])]


def _table(scheme: str, tokens: Sequence[int], set_bytes: int, launch: float, pool: _Pool) -> Table:
    """us per million weights, at each number of tokens."""
    n, k = (4096 if set_bytes > CACHED_BYTES else 512), 2048
    few = min(set_bytes, 32 << 20)  # a product of many tokens is not bound by reading weights
    us = {t: _linear_us(n, k, scheme, t, set_bytes if t <= 16 else few, pool) for t in tokens}
    return {t: max(us[t] - launch, 0.0) / (n * k / 1e6) for t in tokens}


def _linear_us(n: int, k: int, scheme: str, tokens: int, set_bytes: int, pool: _Pool) -> float:
    """us of one linear [n, k] among as many others as fill `set_bytes`."""
    size = packed_bytes(n, k, scheme) if scheme in SCHEMES else n * k * 2
    x = torch.randn(tokens, k).bfloat16()
    weights = [pool.weight(n, k, scheme) for _ in range(max(set_bytes // size, 2))]
    return chain_us([(torch.ops.unicorn.linear.default, (x, w, None, n)) for w in weights])


def _bare_launch_us(pool: _Pool) -> float:
    """us of a product on all threads without its weights, among others of its kind: part of every measured point."""
    half, double = (_linear_us(n, 1024, "w8c", 1, CACHED_BYTES, pool) for n in (512, 2048))
    return min(max(half - (double - half) / 3, 0.0), half)


def _norm_us(tokens: int, width: int) -> float:
    x, w = torch.randn(tokens, width).bfloat16(), torch.ones(width).bfloat16()
    return chain_us([(torch.ops.unicorn.rms_norm.default, (x, w, 1e-6, 0.0))] * 4)


def _gather_us(tokens: int, width: int, pool: _Pool) -> float:
    rows = pool.bytes.nbytes // 2 // width
    table = pool.weight(rows, width, "w8a")
    ids = [torch.randint(0, rows, (1, tokens)) for _ in range(4)]
    return chain_us([(torch.ops.unicorn.embedding.default, (i, table, rows, width, torch.bfloat16)) for i in ids])


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention(cold_bytes: int) -> tuple[Table, Table]:
    """Two head widths tell what a key costs per multiply-add and what per head."""
    narrow, wide = (_attention_table(width, cold_bytes) for width in WIDTHS)
    macs = [HEADS * 2 * width for width in WIDTHS]
    each = {t: max(wide[t] - narrow[t], 0.0) / (macs[1] - macs[0]) for t in wide}
    return each, {t: max(narrow[t] - each[t] * macs[0], 0.0) / HEADS for t in wide}


def _attention_table(width: int, cold_bytes: int) -> Table:
    """Query tokens -> us per million keys."""
    wo, s = empty_packed(16, HEADS * width, "w8c")
    wo.fill_(128)
    s.fill_(1e-3)

    def us(tokens: int, keys: int) -> float:
        q = torch.randn(1, HEADS, tokens, width).bfloat16()
        copies = cold_bytes // 3 // (4 * keys * width) if tokens <= cost.FEW else 0  # a prompt's were just written
        sets = [torch.randn(2, 1, 1, keys, width).bfloat16() for _ in range(max(copies, 2))]
        calls = [(q, k, v, None, True, 0.06, 0.0, [wo, s], None, 16, None, None, 0.0, None) for k, v in sets]
        return chain_us([(torch.ops.unicorn.int8_attention.default, call) for call in calls])

    few, many = us(1, KEYS // 4), us(1, KEYS)
    fixed = min(max(few - (many - few) / 3, 0.0), few)
    table = {}
    for t in cost.TOKENS:
        keys = KEYS if t <= cost.FEW else max(t, KEYS // 2)
        table[t] = max(us(t, keys) - fixed, 0.1) / (cost.seen_keys(t, keys) / 1e6)
    return table


# ---- launches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """Sizes of a decoder layer: attention in w8c over one K/V head, feed-forward in w4g32."""

    hidden: int
    heads: int
    head_dim: int
    ffn: int
    keys: int

    @property
    def bytes(self) -> int:
        """Of its weights, about."""
        return self.hidden * (17 * self.ffn // 10 + (2 * self.heads + 2) * self.head_dim)

    def calls(self, pool: _Pool) -> list[tuple[Step, Call]]:
        """One token through the layer: what the cost model sees, and the call."""
        k, d, ops = self.hidden, self.head_dim, torch.ops.unicorn
        q = self.heads * d
        x, query = torch.randn(1, 1, k).bfloat16(), torch.randn(1, self.heads, 1, d).bfloat16()
        keys, values = torch.randn(2, 1, 1, self.keys, d).bfloat16()
        norm = (torch.ones(k).bfloat16(), 1e-6, 0.0)
        heads = (
            *torch.ones(2, d).bfloat16(),
            1e-6,
            0.0,
            *torch.ones(2, 1, 1, d).bfloat16(),
            self.heads,
            1,
            d,
            False,
            False,
        )

        def step(kind: str, scheme: str, *sizes: tuple[int, int], **more: Any) -> Step:
            width = sizes[0][1] + sum(n for n, _ in sizes[kind == "ffn" :])
            counts = tuple(n * k for n, k in sizes)
            return Step(kind, "", "", "cpu", (scheme,) * len(sizes), 0, weights=counts, width=width, **more)

        wide, tall = (self.ffn, k), (k, self.ffn)
        qkv = [pool.weight(n, k, "w8c") for n in (q, d, d)]
        wo = pool.weight(k, q, "w8c")
        ffn = [pool.weight(*size, "w4g32") for size in (wide, wide, tall)]
        costs: dict[str, Any] = {"key_macs": 2 * q, "key_heads": self.heads, "key_bytes": 4 * d}
        attend = (query, keys, values, None, True, 0.06, 0.0, wo, None, k, *norm, x)
        return [
            (step("qkv", "w8c", (q, k), (d, k), (d, k)), (ops.int8_qkv.default, (x, *norm, *qkv, [], *heads))),
            (step("attention", "w8c", (k, q), **costs), (ops.int8_attention.default, attend)),
            (
                step("ffn", "w4g32", wide, wide, tall),
                (ops.int4_ffn.default, (x, *norm, *ffn, [], "gelu_tanh", self.ffn, k, *norm, x)),
            ),
        ]

    def ends(self, pool: _Pool) -> list[tuple[Step, Call]]:
        """What a model has once: the embedding of a token, the last norm, and a head, with a small vocabulary."""
        k, rows, ops = self.hidden, 512, torch.ops.unicorn
        x, table = torch.randn(1, 1, k).bfloat16(), pool.weight(rows, k, "w8a")

        def step(kind: str, **more: Any) -> Step:
            return Step(kind, "", "", "cpu", ("w8a",) * ("weights" in more), 0, **more)

        return [
            (
                step("embedding", width=k),
                (ops.embedding.default, (torch.randint(0, rows, (1, 1)), table, rows, k, torch.bfloat16)),
            ),
            (step("norm", width=k), (ops.rms_norm.default, (x, torch.ones(k).bfloat16(), 1e-6, 0.0))),
            (step("linear", width=k + rows, weights=(rows * k,)), (ops.linear.default, (x, table, None, rows))),
        ]


BIG, SMALL = _Layer(1152, 4, 256, 6912, 512), _Layer(256, 4, 64, 1024, 128)


def _launches(layer: _Layer, set_bytes: int, without: Rates, pool: _Pool) -> dict[str, float]:
    """Kind of region -> us of one in a decode step, beside what `without` (rates that know no launches) predicts.

    In a model a region meets code, norms and tables that the weights of the others have pushed out of the caches.
    """
    layers = [call for _ in range(max(set_bytes // layer.bytes, 4)) for call in layer.calls(pool)]
    begin, *end = layer.ends(pool)
    calls = [begin, *layers, *end]
    run, program = _program([call for _, call in calls]), torch.classes.unicorn.Program
    run()
    program.traced()
    program.trace(True)
    try:
        for _ in range(TRACED_RUNS):
            _between_tokens()
            run()
    finally:
        program.trace(False)
    times: dict[str, list[float]] = {}
    for (step, _), (*_, ns) in zip(calls * TRACED_RUNS, program.traced(), strict=True):
        times.setdefault(step.kind, []).append(ns / 1e3)
    known = {step.kind: cost.microseconds(step, 1, layer.keys, without, layer is SMALL) or 0.0 for step, _ in calls}
    return {kind: max(statistics.median(us) - known[kind], 0.5) for kind, us in times.items()}


def _between_tokens() -> None:
    """Some 0.5 ms of Python, as in a loop of `generate`: what the first region finds in the caches."""
    json.loads(json.dumps({str(i): [i] for i in range(500)}))


# ---- running -------------------------------------------------------------------------------------------------------


def chain_us(calls: Sequence[Call]) -> float:
    """us of one of these calls on average, run one after the other by a native program."""
    run = _program(calls)

    def seconds_of_a_run() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    first = seconds_of_a_run()
    seconds = [first] if first > LONG_S else []
    end = time.perf_counter() + POINT_S
    while len(seconds) < (2 if first > LONG_S else 3) or time.perf_counter() < end:
        seconds.append(seconds_of_a_run())
    # The lower quartile: other programs only ever add time.
    return statistics.quantiles(seconds, n=4)[0] / len(calls) * 1e6


def _program(calls: Sequence[Call]) -> Callable[[], Any]:
    from unicorn_backend.graph.lower import lower

    graph = Graph()
    inputs: dict[int, tuple[Node, Tensor]] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, list):
            return [argument(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in inputs:
            inputs[id(value)] = graph.placeholder(f"t{len(inputs)}"), value
        return inputs[id(value)][0]

    steps = [(op, tuple(map(argument, arguments))) for op, arguments in calls]
    nodes = [graph.call_function(op, arguments) for op, arguments in steps]
    graph.output((nodes[-1],))  # its op has one result; all others are dropped where nothing reads them
    run = lower(GraphModule(torch.nn.Module(), graph))
    assert not isinstance(run, str), run
    return run.bind(range(len(inputs)), [tensor for _, tensor in inputs.values()])
