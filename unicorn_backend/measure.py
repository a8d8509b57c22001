"""Measuring: generation speed, memory bandwidth, bytes per token, and where a number came from.

Speed is taken from an ordinary `generate` call by a streamer that only writes down times: up to the first
token is prefill, the rest is decode. Systems are compared in interleaved rounds, by medians, because a
laptop's clock and a shared machine's memory drift more between runs than most changes are worth.
"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from unicorn_backend import assets

BUG_SHARE = 1.05
"""Reading faster than 105 % of the measured bandwidth means that a measurement is wrong."""


@dataclass(frozen=True)
class Timing:
    """One run: tokens per second of the prompt and of each token after the first."""

    prefill_tok_s: float
    decode_tok_s: float


class Stopwatch:
    """A `generate` streamer that keeps the time of every call: the prompt first, then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def timing(self, prompt_tokens: int) -> Timing:
        start, first, last = self.times[0], self.times[1], self.times[-1]
        return Timing(prompt_tokens / (first - start), (len(self.times) - 2) / (last - first))


def generate_timed(model: Any, ids: torch.Tensor, new_tokens: int, **settings: Any) -> Timing:
    """Greedy generation of exactly `new_tokens` from ids [1, T]."""
    watch = Stopwatch()
    settings = {"do_sample": False, "eos_token_id": None, **settings}
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=watch, **settings)
    return watch.timing(ids.shape[1])


def last_logits_hash(model: Any, ids: torch.Tensor, new_tokens: int, **settings: Any) -> str:
    """SHA-256 (12 hex digits) of the last step's logits: two builds that agree here computed the same thing."""
    settings = {"do_sample": False, "eos_token_id": None, **settings}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return hashlib.sha256(out.logits[-1].float().contiguous().numpy().tobytes()).hexdigest()[:12]


T = TypeVar("T")


def interleave(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Every run once per round, in alternating order (AB, BA, ...), so that drift hits all of them alike."""
    timings: dict[str, list[T]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in list(runs)[:: 1 if index % 2 == 0 else -1]:
            timings[name].append(runs[name]())
    return timings


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def bracketed(run: Callable[[], T]) -> tuple[T, float]:
    """A run, and the mean of the bandwidths read right before and after it: that of a shared machine drifts."""
    before = read_bandwidth(1 << 28)
    result = run()
    return result, (before + read_bandwidth(1 << 28)) / 2


def read_bandwidth(size_bytes: int = 1 << 30, passes: int = 6) -> float:
    """GB/s of reading memory in order on torch's threads: the best of some passes over `size_bytes`.

    Passes take turns with the two ways of prefetching; which one is faster depends on the CPU. Anything that
    disturbs a pass only lowers it, so the best one is the one to call the ceiling.
    """
    assets.load_native()
    data = torch.classes.unicorn.Arena([size_bytes]).place(
        torch.ones(1).expand(size_bytes // 4)
    )  # in huge pages, as the weights
    seconds = []
    for number in range(passes):
        start = time.perf_counter()
        torch.ops.unicorn.read_bytes(data, number % 2 == 1)
        seconds.append(time.perf_counter() - start)
    return size_bytes / min(seconds) / 1e9


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one decode step reads: the text decoder and the head, each tensor once.

    Of an embedding table that the head does not share only single rows are read; it is left out.
    """
    model = getattr(model, "_orig_mod", model)
    read = _storages(model.get_decoder()) | _storages(model.get_output_embeddings())
    embedding = model.get_input_embeddings()  # beside its table it may hold a scalar, which is read
    table = {at: size for at, size in _storages(embedding).items() if size >= embedding.num_embeddings}
    if not table.keys() & _storages(model.get_output_embeddings()).keys():
        read = {pointer: size for pointer, size in read.items() if pointer not in table}
    return sum(read.values())


def model_bytes(model: Any) -> int:
    """Bytes of all weights and buffers, shared ones once."""
    return sum(_storages(getattr(model, "_orig_mod", model)).values())


def kv_bytes(model: Any, context: int) -> int:
    """Bytes of keys and values that one decode step reads at a context length; 0 for layers that keep none.

    A compiled model's option `kv` decides on the bytes of a row; otherwise they are bf16.
    """
    from unicorn_backend.integration.torch_hooks import options_of
    from unicorn_backend.layouts import ROW_SCALE

    options = options_of(getattr(model, "dynamo_ctx", None))
    config = model.config.get_text_config()
    layers = list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    total = 0
    for kind, layer in zip(kinds, layers, strict=True):
        heads = getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", 0)
        if not heads or kind not in ("full_attention", "sliding_attention"):
            continue
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        row = head_dim + ROW_SCALE if options is not None and options.kv == "int8" else 2 * head_dim
        total += 2 * heads * row * (min(context, layer.sliding_window) if kind == "sliding_attention" else context)
    return total


def _storages(module: torch.nn.Module) -> dict[int, int]:
    """Address -> bytes of the distinct tensors of a module."""
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.data_ptr(): tensor.nbytes for tensor in tensors}


def ram() -> tuple[int, int]:
    """Bytes of RAM: all, and what can be had without swapping, by the kernel's estimate.

    Where the process is in a control group with less (a container), of that group.
    """
    fields = _first_lines(Path("/proc/meminfo"))
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    groups = Path("/proc/self/cgroup")  # none in a kernel without control groups
    for limit, free in _group_limits(groups.read_text() if groups.exists() else "", Path("/sys/fs/cgroup")):
        total, available = min(total, limit), min(available, free)
    return total, max(available, 0)


def _group_limits(groups: str, root: Path) -> list[tuple[int, int]]:
    """(limit, what is left of it without cached files) in bytes of the control groups around this process.

    groups: text of /proc/self/cgroup. root: where control groups are mounted, of version 2 or 1.
    """
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = root, "memory.max", "memory.current"
        elif controllers == "memory":
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = base / path.lstrip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(base))):
            most = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            if most != "max":
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                files = sum(int(cached.get(f"{prefix}_file", 0)) for prefix in ("active", "inactive"))
                found.append((int(most), int(most) - int((folder / usage).read_text()) + files))
    return found


def last_level_cache_bytes() -> int:
    """Size of the largest cache of CPU 0, or 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().rstrip("K")) * 1024 for size in sizes), default=0)


def provenance() -> dict[str, Any]:
    """What a number depends on: machine and what else it does, versions, commit, threads, date."""
    info = _first_lines(Path("/proc/cpuinfo"))
    flags = set(info.get("flags", "").split())
    isa = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16")
    return {
        "cpu": cpu_name(),
        "cpu_family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "isa": [name for name in isa if name in flags],
        "virtual_machine": "hypervisor" in flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    return _first_lines(Path("/proc/cpuinfo")).get("model name", platform.processor() or "unknown")


def _first_lines(path: Path) -> dict[str, str]:
    """The `key : value` lines of a file in /proc up to the first empty line; empty where there is none."""
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _commit() -> str:
    """Commit of the source tree, `+` appended where the package differs from it; `unknown` outside git."""
    root = Path(__file__).parent
    git = ("git", "-C", str(root))
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
