"""Quantize a checkpoint from disk to disk, weight by weight, without ever holding the model.

Each core reads and packs blocks of rows of its own, so that none waits for another; one more thread writes
them in order and takes checksums. Every scheme works row by row, so a block of rows packs to exactly the bytes that
the whole weight would: the files hold what `quantize(model)` and `save_pretrained` write, bit for bit, and
the memory in use is a few blocks, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unicorn_backend.errors import CheckpointError, OptionError, QuantizationError
from unicorn_backend.formats.safetensors import StoredTensor
from unicorn_backend.formats.target import Encoded, Noise, Rows, Target, Unicorn
from unicorn_backend.layouts import ROWS
from unicorn_backend.quantize import card, outliers, report, rewrite
from unicorn_backend.quantize.calibration import SAMPLE, Calibration, calibrate, model_and_ids, on_grid
from unicorn_backend.quantize.calibration import importance as mean_squares
from unicorn_backend.quantize.output import Output
from unicorn_backend.quantize.prescale import Scaling
from unicorn_backend.quantize.recipe import FLOAT, Recipe
from unicorn_backend.quantize.schemes import SEARCHED, ensure_kernels, quantization_noise
from unicorn_backend.quantize.skeleton import Skeleton, skeleton
from unicorn_backend.quantize.source import Source, open_source

BLOCK_BYTES = 1 << 24  # of the source; one per core and a few more are in memory
AHEAD = 2  # blocks beyond one per core that are packed, and that wait to be written
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("unicorn", "gguf", "compressed-tensors")
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Piece:
    """A stored tensor and what becomes of it.

    dtype: what `from_pretrained` would load it as, and what is packed or copied.
    kept: the stored values are taken over, packed; exact: to the bit.
    importance: of the columns, for the search of scales.
    name: of the module, for what `scaling` does to its weight.
    together: rows that no block may separate.
    """

    stored: StoredTensor
    dtype: torch.dtype
    scheme: str
    reason: str = ""
    importance: Tensor | None = field(default=None, compare=False)
    name: str = ""
    together: int = 1
    scaling: Scaling = field(default_factory=Scaling, compare=False)

    @property
    def kept(self) -> bool:
        return self.scheme != FLOAT and self.stored.scheme == self.scheme

    @property
    def exact(self) -> bool:
        return self.kept and self.stored.exact

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last) rows of a weight in steps of whole tiles, or elements of a float copy."""
        if self.scheme == FLOAT:
            total, unit, unit_bytes = self.stored.numel, 1, self.stored.dtype.itemsize
            if self.together > 1:
                unit = self.together * total // self.stored.shape[0]
                unit_bytes *= unit
        else:
            total, unit = self.stored.shape[0], math.lcm(ROWS, self.together)
            unit_bytes = unit * self.stored.nbytes // total
        step = max(1, BLOCK_BYTES // unit_bytes) * unit
        for first in range(0, max(total, 1), step):
            yield first, min(first + step, total)


@dataclass(frozen=True)
class Block:
    """Rows (or elements) first..last-1 of a piece."""

    piece: Piece
    first: int
    last: int

    def read(self) -> Rows:
        stored = self.piece.stored
        if self.piece.kept:
            return stored.packed_rows(self.first, self.last)
        name, scaling = self.piece.name, self.piece.scaling
        if self.piece.scheme != FLOAT:
            return scaling.apply([name], stored.rows(self.first, self.last).to(self.piece.dtype), self.first)
        if name in scaling.norms:
            return scaling.norms[name][self.first : self.last]
        return stored.read(self.first, self.last).to(self.piece.dtype)

    @property
    def stored_bytes(self) -> int:
        stored = self.piece.stored
        return (self.last - self.first) * (stored.dtype.itemsize if self.piece.scheme == FLOAT else stored.row_bytes)

    @property
    def is_last(self) -> bool:
        stored = self.piece.stored
        return self.last == (stored.numel if self.piece.scheme == FLOAT else stored.shape[0])


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    recipe: str | Recipe = "default",
    *,
    rules: rewrite.Rules | None = None,
    calibration: str | Path | None = None,
    outlier_bits: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
    format: str = "unicorn",
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Quantize the checkpoint `src` into the new folder `dst`; returns what `quantization_report.json` says.

    src: a folder written by save_pretrained, a hub id, or "tiny".
    recipe, rules: as for `quantize`; a function in `rules` sees modules without weights.
    calibration: a UTF-8 text; the float model runs on it (and must fit into the memory), and what the columns of its
        weights meet there weighs their errors and scales them first, as for `quantize`.
    outlier_bits: bits per weight of all linears to spend on those that suffer most from the recipe's few bits on the
        calibration text: INT8 instead of w4g32, k-quants or INT8 instead of others.
    format: "unicorn", "gguf" or "compressed-tensors".
    resume: go on with an interrupted run of the same arguments. overwrite: replace an existing folder.
    progress: show a bar; None shows one from 1 GB on.

    Raises CheckpointError and QuantizationError, naming file and tensor. `dst` appears complete or not at all.
    """
    start = time.perf_counter()
    ensure_kernels()
    source = open_source(src)
    if format != Unicorn.name:
        source = source.without_close()
    model, run, notes = _decide(source, format, recipe, rules, calibration, outlier_bits)
    target = _target(format, source, model)
    pieces = [replace(piece, together=target.together(piece.stored.name)) for piece in plan_pieces(source, model)]
    pieces += [_copy(stored, stored.dtype, "follows from the config") for stored in target.computed()]
    if run is not None:
        pieces, refused = _calibrated(pieces, source, model, *run)
        notes += refused
        del run
    declared = {name: what for piece in pieces for name, what in _outputs(piece, target).items()}
    identity = _identity(source, model.recipe, target, shard_bytes, calibration)
    layout = target.layout(declared, shard_bytes)
    with Output(Path(dst), layout, identity, resume=resume, overwrite=overwrite) as output:
        records = dict(output.done)
        todo = [piece for piece in pieces if piece.stored.name not in records]
        for record in _run(todo, target, output, progress):
            records[record["name"]] = record
        result = report.build(source, model, target, [records[piece.stored.name] for piece in pieces], start)
        result["calibration"] = identity["calibration"]
        result["notes"] += notes
        target.write_beside(output.partial, source, model, {row["name"]: row["scheme"] for row in result["weights"]})
        card.write_card(output.partial, source, result)
        output.publish()
    return result


def _decide(
    source: Source,
    format: str,
    recipe: str | Recipe,
    rules: rewrite.Rules | None,
    calibration: str | Path | None,
    outlier_bits: float,
) -> tuple[Skeleton, tuple[Any, Tensor] | None, tuple[str, ...]]:
    """(the model and its schemes, the float model and the ids to calibrate with, notes)."""
    # The other formats know experts one by one only, as they are stored.
    tensors = source.tensors if format == Unicorn.name else None
    model = skeleton(source.config, source.dtype, recipe, rules, source.kept_schemes(), tensors)
    notes = _useless_rules(model, rules)
    run = None if calibration is None else model_and_ids(source, type(model.model), calibration)
    if outlier_bits:
        found = outliers.rules(model.model, model.recipe, rules, run, outlier_bits)
        rules, notes = outliers.after(rules, found), notes + outliers.notes(found)
        model = skeleton(source.config, source.dtype, recipe, rules, source.kept_schemes(), tensors)
    return model, run, notes


def _useless_rules(model: Skeleton, rules: rewrite.Rules | None) -> tuple[str, ...]:
    """A note for each rule that is a name misspelt."""
    names = [name for name, module in model.model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    patterns = rules if isinstance(rules, Mapping) else ()
    useless = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    return tuple(f"rule {pattern!r} fits no linear and no embedding" for pattern in useless)


def _target(name: str, source: Source, model: Skeleton) -> Target:
    if name == "unicorn":
        return Unicorn()
    if name == "gguf":
        from unicorn_backend.formats.gguf_out import GgufOut

        return GgufOut(source, model)
    if name == "compressed-tensors":
        from unicorn_backend.formats.compressed_tensors import CompressedTensorsOut

        return CompressedTensorsOut(source, model)
    raise OptionError(f"format: got {name!r}, allowed are {', '.join(FORMATS)}")


def plan_pieces(source: Source, model: Skeleton) -> list[Piece]:
    """What becomes of every stored tensor. CheckpointError if one is missing, double, or of a wrong shape."""
    owners: dict[str, StoredTensor] = {}
    pieces: list[Piece] = []
    stacked = {part.name: stack for stack in model.stacks.values() for part in stack.parts}
    for stored in source.tensors.values():
        if stored.name in stacked:  # with the others of its stack, where the first of them is
            if (stack := stacked[stored.name]).name not in owners:
                owners[stack.name] = stack
                _check_shape(stack, stack.name, model)
                pieces.append(_packed(stack, model.dtype_of(stack.name), model.schemes[stack.name]))
            continue
        name = model.parameter_of(stored.name)
        if name is None:
            if model.is_merged(stored.name):
                pieces.append(_copy(stored, source.dtype, "merged while loading"))
            continue
        if name in owners:
            raise CheckpointError(
                f"{stored.file}: {stored.name!r} and {owners[name].name!r} are the same weight {name}"
            )
        owners[name] = stored
        _check_shape(stored, name, model)
        if stored.name.endswith(".weight") and name in model.schemes:
            pieces.append(_packed(stored, model.dtype_of(name), model.schemes[name]))
        else:
            reason = model.left.get(name.rpartition(".")[0], "") if name.endswith(".weight") else ""
            pieces.append(_copy(stored, model.dtype_of(name), reason))
    merged = any(model.is_merged(name) for name in source.tensors.keys() - stacked.keys())
    if absent := [] if merged else model.missing(owners):
        raise CheckpointError(
            f"{source.place}: no tensor for {absent[0]} ({len(absent)} missing): is a shard missing, "
            "or does config.json belong to another model?"
        )
    return _without_tied(pieces, owners, model)


def _calibrated(
    pieces: list[Piece], source: Source, model: Skeleton, float_model: Any, ids: Tensor
) -> tuple[list[Piece], tuple[str, ...]]:
    """The pieces with what the text tells about them, and why some of them are not scaled."""
    tied = getattr(model.model, "all_tied_weights_keys", None) or {}
    users: dict[str, list[str]] = {}
    for name in model.schemes:
        users.setdefault(tied.get(name, name), []).append(name.removesuffix(".weight"))
    owners = {piece.stored.name: model.parameter_of(piece.stored.name) or "" for piece in pieces}
    alone = {
        users[name][0]: piece
        for piece in pieces
        if len(users.get(name := owners[piece.stored.name], ())) == 1 and not piece.kept
    }

    def takes_part(name: str) -> bool:
        if name not in alone:
            return False
        stored, dtype = alone[name].stored, alone[name].dtype
        return not on_grid(stored.rows(0, min(SAMPLE, stored.shape[0])).to(dtype), alone[name].scheme)

    packed = source.gguf is not None
    found = Calibration(mean_squares(float_model, ids)) if packed else calibrate(float_model, ids, takes_part)
    new = []
    for piece in pieces:
        name = owners[piece.stored.name]
        wanted = piece.scheme in SEARCHED and not piece.kept
        importance = found.importance_of(users.get(name, ())) if wanted else None
        new.append(replace(piece, importance=importance, name=name.removesuffix(".weight"), scaling=found.scaling))
    return new, found.scaling.refused


def _without_tied(pieces: list[Piece], owners: Mapping[str, StoredTensor], model: Skeleton) -> list[Piece]:
    """Drop the second copy of a weight that the model ties; CheckpointError if the copies differ."""
    dropped = set()
    for name, stored in owners.items():
        first = owners.get(model.tied_to(name) or "")
        if first is None:
            continue
        if not _same(first, stored):
            raise CheckpointError(
                f"{stored.file}: {stored.name!r} differs from {first.name!r}, but config.json ties them: "
                "set tie_word_embeddings to false"
            )
        dropped.add(stored.name)
    return [piece for piece in pieces if piece.stored.name not in dropped]


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = BLOCK_BYTES // a.dtype.itemsize
    ranges = ((first, min(first + step, a.numel)) for first in range(0, a.numel, step))
    return all(torch.equal(a.read(*r), b.read(*r)) for r in ranges)


def _check_shape(stored: StoredTensor, name: str, model: Skeleton) -> None:
    wanted = tuple(model.state[name].shape)
    if stored.shape != wanted:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name!r} has shape {list(stored.shape)}, the model has {list(wanted)}: "
            "config.json does not belong to these weights"
        )


def _packed(stored: StoredTensor, dtype: torch.dtype, scheme: str) -> Piece:
    if stored.scheme != scheme and stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name!r} is {stored.dtype}; bf16, fp16 and fp32 are quantized"
        )
    # What a quantized file holds is not rounded to the model's dtype before it is quantized again.
    return Piece(stored, stored.dtype if stored.type_name else dtype, scheme)


def _copy(stored: StoredTensor, dtype: torch.dtype, reason: str) -> Piece:
    if not stored.dtype.is_floating_point:
        dtype = stored.dtype
    return Piece(stored, dtype, FLOAT, reason)


def _run(pieces: list[Piece], target: Target, output: Output, progress: bool | None) -> Iterator[dict[str, Any]]:
    """Read, pack and write all pieces; yields the record of each one when it is on disk."""
    total = sum(piece.stored.nbytes for piece in pieces)
    hidden = total < rewrite.PROGRESS_BYTES if progress is None else not progress
    blocks = (Block(piece, *rows) for piece in pieces for rows in piece.blocks())
    sums: list[Noise] = []
    pending: deque[Future[dict[str, Any] | None]] = deque()
    threads = torch.get_num_threads()
    try:
        with (
            ThreadPoolExecutor(threads, "pack", initializer=torch.set_num_threads, initargs=(1,)) as packers,
            ThreadPoolExecutor(1, "write") as writer,
            tqdm(total=total, desc="Quantizing", unit="B", unit_scale=True, disable=hidden) as bar,
        ):
            for block, (encoded, noise) in _ahead(packers, target, blocks, threads + AHEAD):
                sums.append(noise)
                pending.append(writer.submit(_write, output, target, block, encoded, sums if block.is_last else None))
                if block.is_last:
                    sums = []
                while len(pending) > AHEAD:
                    if record := pending.popleft().result():
                        yield record
                bar.update(block.stored_bytes)
            for future in pending:
                if record := future.result():
                    yield record
    finally:
        torch.set_num_threads(threads)  # the packers' setting is also the default of threads to come


def _ahead(
    pool: ThreadPoolExecutor, target: Target, blocks: Iterable[Block], count: int
) -> Iterator[tuple[Block, tuple[list[Encoded], Noise]]]:
    """The blocks in order, read and packed, at most `count` of them before their use."""
    waiting: deque[tuple[Block, Future[tuple[list[Encoded], Noise]]]] = deque()
    for block in blocks:
        waiting.append((block, pool.submit(_encode, target, block)))
        if len(waiting) >= count:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _outputs(piece: Piece, target: Target) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    return target.outputs(piece.stored.name, piece.dtype, piece.stored.shape, piece.scheme)


def _encode(target: Target, block: Block) -> tuple[list[Encoded], Noise]:
    """Read a block and pack it. QuantizationError, naming file and tensor, for NaN or Inf."""
    stored, scheme, rows = block.piece.stored, block.piece.scheme, block.read()
    first = block.first * (stored.shape[1] if scheme != FLOAT else 1)
    if isinstance(rows, list) or scheme == FLOAT:  # the quantizers look themselves
        for tensor in rows if isinstance(rows, list) else [rows]:
            if tensor.dtype in FLOATS and torch.ops.unicorn.count_nonfinite(tensor):
                raise _not_finite(stored, first, rows)
    try:
        encoded, noise = target.encode(stored.name, stored.shape, scheme, block.first, rows, block.piece.importance)
    except ValueError as error:
        raise _not_finite(stored, first, rows) from error
    if isinstance(rows, list) and not stored.exact:
        noise = quantization_noise(stored.rows(block.first, block.last), rows)
    return encoded, noise


def _not_finite(stored: StoredTensor, offset: int, rows: Rows) -> QuantizationError:
    where = ""
    if isinstance(rows, Tensor):
        bad = torch.nonzero(~torch.isfinite(rows.flatten()))[:, 0]
        where = f", first at {[int(i) for i in torch.unravel_index(bad[0] + offset, stored.shape)]}"
    return QuantizationError(
        f"{stored.file}: tensor {stored.name!r} {list(stored.shape)} has NaN or Inf{where}: the checkpoint "
        "is damaged or the model diverged; repair the weight"
    )


def _write(
    output: Output, target: Target, block: Block, encoded: list[Encoded], sums: list[Noise] | None
) -> dict[str, Any] | None:
    """Write a block; with the last one (`sums` given) note the weight as finished and return its record."""
    for name, offset, tensor in encoded:
        output.write(name, offset, tensor)
    if sums is None:
        return None
    outputs = _outputs(block.piece, target)
    label = target.label(block.piece.stored.shape, block.piece.scheme)
    places = {name: (output.place(name).nbytes, output.checksum(name)) for name in outputs}
    record = report.weight(block.piece, label, outputs, places, sums)
    output.finish_weight(record)
    return record


def _identity(
    source: Source, recipe: Recipe, target: Target, shard_bytes: int, calibration: str | Path | None
) -> dict[str, Any]:
    """What an interrupted run must share with the one that continues it."""
    files = sorted({tensor.file for tensor in source.tensors.values()})
    states = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return {
        "files": states,
        "recipe": recipe.to_dict(),
        "format": target.name,
        "shard_bytes": shard_bytes,
        "calibration": calibration
        and {
            "text": Path(calibration).name,
            "sha256": hashlib.sha256(Path(calibration).read_bytes()).hexdigest(),
        },
        **report.versions(),
    }
