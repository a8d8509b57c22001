"""What the runtime relies on, checked on the real pyxrt over the fake driver, and on its stand-in.

    python contract.py emulator FOLDER          the stand-in of `unicorn_backend/runtime/npu/emulator.py`
    python contract.py pyxrt FOLDER [FAULT]     the real module; FOLDER/<key> as `run.sh` made them
    python contract.py wrapper FOLDER [FAULT]   our C wrapper over libxrt
    python contract.py machine FOLDER CASE      what `unicorn doctor` says of the machine, from the real xrt-smi

Needs NumPy only. Prints one line per check, ends with 1 if one failed.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
import shutil
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def _without_torch() -> None:
    for name in ("unicorn_backend", "unicorn_backend.runtime", "unicorn_backend.runtime.npu"):
        module = types.ModuleType(name)
        module.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, module)


if "torch" not in sys.modules:  # in the chroot, which has none
    _without_torch()

import numpy as np  # noqa: E402

from unicorn_backend.runtime.npu import arithmetic, artifacts, machine, pack  # noqa: E402
from unicorn_backend.runtime.npu.artifacts import Artifact  # noqa: E402
from unicorn_backend.runtime.npu.designs import Attention, Design, Gemm, key  # noqa: E402
from unicorn_backend.runtime.npu.engine import NpuEngine, NumpyEngine, Unavailable, test_case  # noqa: E402
from unicorn_backend.runtime.npu.xrt import COMPLETED, PENDING, CXrt, PyXrt, XrtError  # noqa: E402

GEMM, ATTENTION = Gemm("npu1", 256, 512), Attention("npu1", 64, 32, 64, 2)
OTHER_K = Gemm("npu1", 128, 512)
DESIGNS: tuple[Design, ...] = (GEMM, ATTENTION, OTHER_K)
BUDGET = 1 << 30

failures: list[str] = []


def check(name: str, passed: bool) -> None:
    print(("ok    " if passed else "FAIL  ") + name, flush=True)
    if not passed:
        failures.append(name)


def raises(kind: type[Exception], call: Callable[[], Any]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def message_of(kind: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return ""


def test_module(api: Any, folder: Path) -> None:
    """pyxrt itself, one by one: what is used, and the traps that `xrt.py` is written around."""
    directions, states = api.xclBOSyncDirection, api.ert_cmd_state
    artifact = artifact_of(folder, ATTENTION)
    check("one device is there", api.enumerate_devices() == 1)
    check("another index is an error", raises(RuntimeError, lambda: api.device(3)))
    device = api.device(0)
    check("it has its name", device.get_info(api.xrt_info_device.name) == "RyzenAI-npu1")
    image = api.xclbin(str(artifact.folder / artifacts.XCLBIN))
    found = [(k.get_name(), k.get_num_args()) for k in image.get_kernels()]
    check("the xclbin has one kernel of six arguments", found == [("MLIR_AIE", 6)])
    check(
        "no context before the xclbin is registered",
        raises(Exception, lambda: api.hw_context(device, image.get_uuid())),
    )
    device.register_xclbin(image)
    context = api.hw_context(device, image.get_uuid())
    kernel = api.kernel(context, "MLIR_AIE")
    check("groups of arguments", [kernel.group_id(i) for i in range(6)] == [131071, 65537, 131071] + [65536] * 3)
    check("an unknown kernel is an error", raises(RuntimeError, lambda: api.kernel(context, "X")))
    group = kernel.group_id(3)
    check("bo.normal is refused", raises(RuntimeError, lambda: api.bo(device, 4096, api.bo.normal, group)))

    rows, keys = test_case(ATTENTION, np.random.default_rng(1))
    inputs = [pack.query_blocks(ATTENTION, rows), pack.key_blocks(ATTENTION, keys)]
    want = arithmetic.attend(rows, keys)
    words = np.frombuffer((artifact.folder / artifacts.INSTRUCTIONS).read_bytes(), np.uint32)
    control = api.bo(device, words.nbytes, api.bo.cacheable, kernel.group_id(1))
    control.write(words.view(np.uint8), 0)
    control.sync(directions.XCL_BO_SYNC_BO_TO_DEVICE)
    bos = [
        api.bo(device, size, api.bo.host_only, kernel.group_id(3 + i)) for i, size in enumerate(ATTENTION.buffer_bytes)
    ]
    views = [np.frombuffer(bo.map(), np.uint8) for bo in bos]
    check(
        "a map is writable and whole",
        all(v.flags.writeable and v.size == b.size() for v, b in zip(views, bos, strict=True)),
    )
    check("memory is not zeroed", bool(views[2].any()))
    for view, bo, data in zip(views, bos, inputs, strict=False):
        view[:] = data
        bo.sync(directions.XCL_BO_SYNC_BO_TO_DEVICE)

    def result() -> bool:
        bos[2].sync(directions.XCL_BO_SYNC_BO_FROM_DEVICE)
        got = pack.states(ATTENTION, views[2])
        return all(bool((getattr(got, x) == getattr(want, x)).all()) for x in "mlo")

    def made(opcode: int = 3) -> Any:
        run = api.run(kernel)
        for index, value in enumerate([opcode, control, len(words), *bos]):
            run.set_arg(index, value)
        return run

    run = made()
    run.start()
    check("a run completes", int(run.wait(60000)) == 4)
    check("its integers are NumPy's", result())
    views[2][:] = 0
    bos[2].sync(directions.XCL_BO_SYNC_BO_TO_DEVICE)
    run.start()
    run.wait2()
    check("the same run runs again", result())
    check("read() gives bytes", np.asarray(bos[2].read(64, 0)).view(np.uint8).tobytes() == views[2][:64].tobytes())
    part = api.bo(bos[0], 4096, 4096)
    check("a part of a buffer", np.frombuffer(part.map(), np.uint8).tobytes() == views[0][4096:8192].tobytes())
    check("a float argument is refused", raises(TypeError, lambda: run.set_arg(2, 1.5)))
    check("an argument above 32 bits is refused", raises(TypeError, lambda: run.set_arg(2, 1 << 33)))
    run.set_arg(2, np.int64(len(words)))
    wrong = made(opcode=2)
    wrong.start()
    check("a wrong opcode ends in ERROR", wrong.wait(60000) == states.ERT_CMD_STATE_ERROR)
    wrong.start()
    check("wait2 raises", raises(RuntimeError, wrong.wait2))
    views[2][:] = 0
    bos[2].sync(directions.XCL_BO_SYNC_BO_TO_DEVICE)

    def listed(*runs: Any) -> Any:
        chain = api.runlist(context)
        for one in runs:
            chain.add(one)
        return chain

    links = [made(), made()]
    chain, behind = listed(*links), made()
    chain.execute()
    behind.start()
    while int(behind.state()) in PENDING:
        time.sleep(1e-4)
    started = time.monotonic()
    chain.wait()
    check("commands run in their order: behind a runlist that is done", time.monotonic() - started < 0.1)
    check("a runlist", result())
    chain.execute()
    chain.wait()
    check("the same runlist again", result())
    check("a runlist has no state, and no wait with a limit", not hasattr(chain, "state"))
    check("a limit is a TypeError", raises(TypeError, functools.partial(chain.wait, 100)))
    check("a run of a runlist is not started on its own", raises(RuntimeError, links[0].start))
    del chain  # the real one crashes if it outlives its context
    chain = listed(links[0])
    chain.execute()
    chain.wait()
    check("its runs go into another when it is gone", result())
    del chain
    chain = listed(made(), wrong, made())
    chain.execute()
    check("a run that fails is the runlist's failure", "(ERT_CMD_STATE_ERROR)" in message_of(RuntimeError, chain.wait))
    del chain


def test_engine(engine: NpuEngine) -> None:
    """Everything above it: products and attentions of any size."""
    rng, numpy_engine = np.random.default_rng(2), NumpyEngine()
    a, b = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((301, 250), (400, 250)))
    weights = engine.weights(GEMM, b)
    check("a product over three launches", bool((engine.gemm(weights, a) == a.astype(int) @ b.astype(int).T).all()))
    rows, keys = test_case(ATTENTION, rng)
    rows.last[::3] = rows.first[::3]
    got, want = (e.attend(ATTENTION, rows, keys) for e in (engine, numpy_engine))
    check("an attention", all(bool((getattr(got, x) == getattr(want, x)).all()) for x in "mlo"))
    results: list[bool] = []

    def several() -> None:
        results.append(bool((engine.gemm(weights, a) == a.astype(int) @ b.astype(int).T).all()))

    threads = [threading.Thread(target=several) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check("four threads at once", results == [True] * 4)
    check("runlists are used", engine.xrt.label.endswith(", runlists"))
    check("nine launches, by fours", all(one_by_one(engine, count) for count in (1, 2, 3, 4, 9)))
    context = engine.kernel(GEMM).context
    buffers = [context.buffer(0, 4096)] * 4
    check("an argument too many is an error, not a crash", raises(XrtError, lambda: context.launch(buffers)))


def one_by_one(engine: NpuEngine, count: int) -> bool:
    """`count` launches with inputs of their own, started together, give each its result."""
    context, (rows, keys) = engine.kernel(ATTENTION).context, test_case(ATTENTION, np.random.default_rng(count))
    launches, outputs = [], []
    for turn in range(count):
        buffers = [context.buffer(i, size) for i, size in enumerate(ATTENTION.buffer_bytes)]
        buffers[0].data[:] = pack.query_blocks(ATTENTION, rows.roll(turn))
        buffers[1].data[:] = pack.key_blocks(ATTENTION, keys)
        buffers[0].to_device()
        buffers[1].to_device()
        launches.append(context.launch(buffers))
        outputs.append(buffers[2])
    started = context.start(launches)
    del launches, buffers  # what is on its way belongs to itself
    gc.collect()
    if started.wait(60_000) != COMPLETED:
        return False
    want = arithmetic.attend(rows, keys)
    for turn, output in enumerate(outputs):
        output.from_device()
        got = pack.states(ATTENTION, output.data)
        if not all(bool((getattr(got, x) == np.roll(getattr(want, x), turn, 0)).all()) for x in "mlo"):
            return False
    return True


def test_waiting_lets_others_run(engine: NpuEngine) -> None:
    """With commands of 200 ms: Python threads run while one waits; what is on its way is kept."""
    check("buffers of commands on their way are kept", one_by_one(engine, 3))
    kernel, ticks, stop = engine.kernel(ATTENTION), 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    rows, keys = test_case(ATTENTION, np.random.default_rng(3))
    before = ticks
    with kernel:
        for _ in range(3):
            kernel.submit([pack.query_blocks(ATTENTION, rows), pack.key_blocks(ATTENTION, keys)], lambda raw: None)
    during = ticks - before
    stop.set()
    thread.join()
    check(f"waiting lets other threads run ({during} steps)", during >= 10)


FAULTS = {
    "hang": "no answer in",
    "abort": "state ABORT",
    "error": "state ERROR",
    "memory": "ulimit -l",
    "buffers": "ulimit -l",  # the heap that opening takes is there, and little more
    "contexts": "no hardware context is free",
    "truncated": "truncated",  # found by its checksum
    "damaged": "the file is damaged",  # found by XRT: it was registered like that
    "another-k": "does not give the CPU's integers",  # found by the self-test: nothing else says so
    "midway-hang": "no answer in",  # FAKE_AFTER=5: the self-test of four launches is over
    "midway-abort": "state ABORT",
}


def test_fault(make: Callable[[], NpuEngine], fault: str) -> None:
    """The reason, and that nothing is used after it."""
    try:
        engine = make()
    except XrtError as reason:  # the heap of 64 MiB is locked when the device is opened
        check(f"{fault}, open: {reason}", FAULTS[fault] in str(reason))
        return
    engine.timeout_ms = 500
    a, b = np.ones((9 * GEMM.tokens, GEMM.k), np.int8), np.ones((GEMM.n, GEMM.k), np.int8)
    weights = engine.weights(GEMM, b) if fault.startswith("midway") else None
    for attempt in range(2):
        try:
            engine.prepare(GEMM if fault == "another-k" else ATTENTION) if weights is None else engine.gemm(weights, a)
        except Unavailable as reason:
            check(f"{fault}, call {attempt + 1}: {reason}", FAULTS[fault] in str(reason))
        else:
            check(f"{fault}: nothing was noticed", False)


# Case, as `run.sh` sets it up -> check -> its status and what it says.
MACHINE: dict[str, dict[str, tuple[str, str]]] = {
    "well": {
        "npu": ("ok", "XDNA 1 (Phoenix, Hawk Point); driver amdxdna, the kernel's own"),
        "npu device": ("ok", "/dev/accel/accel0, firmware 1.5.5.391"),
        "npu iommu": ("ok", "IOMMU on, group 12"),
        "xrt libraries": ("ok", "libxrt_driver_xdna.so.2"),
        "npu contexts": ("ok", "6 of 6 free"),
        "npu power": ("info", "mode default"),
    },
    "turbo": {"npu power": ("ok", "mode turbo")},
    "powersaver": {"npu power": ("warn", "mode powersaver")},
    "full": {"npu contexts": ("warn", "1 of 6 free")},
    "memlock": {"locked memory": ("warn", "8.4 MB")},
    "firmware": {"npu power": ("info", "unknown: xrt-smi: "), "npu contexts": ("info", "is its firmware installed?")},
    "no-smi": {"npu power": ("info", "unknown: no xrt-smi")},
}


def test_machine(case: str) -> None:
    found = {one.name: one for one in (*machine.examine(), *machine.ask_xrt())}
    for name, (status, says) in MACHINE[case].items():
        one = found[name]
        check(f"{case}, {name}: {one.status}, {one.found}", one.status == status and says in one.found)
        check(f"{case}, {name}: a fix where it is not ok", (one.status == "ok") != bool(one.fix))


def spoiled(folder: Path, fault: str) -> Path:
    """A copy of the artifacts in which the files are wrong; the manifests agree, except for "truncated"."""
    copy = Path(tempfile.mkdtemp()) / "artifacts"
    shutil.copytree(folder, copy)
    for design in (GEMM, ATTENTION):
        path = artifact_of(copy, design).folder
        if fault == "another-k":
            for name in (artifacts.XCLBIN, artifacts.INSTRUCTIONS):
                shutil.copy(artifact_of(copy, OTHER_K).folder / name, path / name)
        else:
            (path / artifacts.XCLBIN).write_bytes((path / artifacts.XCLBIN).read_bytes()[:20])
        if fault != "truncated":
            manifest = json.loads((path / artifacts.MANIFEST).read_text())
            manifest["files"] = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in manifest["files"]}
            (path / artifacts.MANIFEST).write_text(json.dumps(manifest))
    return copy


def artifact_of(folder: Path, design: Design) -> Artifact:
    return Artifact(folder / key(design), design, artifacts.HOST_MODEL)


def engine_of(kind: str, folder: Path) -> NpuEngine:
    if kind == "wrapper":
        return NpuEngine(CXrt(folder / "libunicorn_xrt.so"), folder, True, BUDGET, 60_000)
    return NpuEngine(PyXrt(module_of(kind), kind), folder, True, BUDGET, 60_000)


def module_of(kind: str) -> Any:
    return importlib.import_module("unicorn_backend.runtime.npu.emulator" if kind == "emulator" else "pyxrt")


def main(kind: str, folder: str, fault: str = "") -> int:
    if kind == "machine":
        test_machine(fault)
    elif fault == "firmware":
        message = message_of(XrtError, lambda: engine_of(kind, Path(folder)))
        check(f"firmware, open: {message}", "the driver did not come up" in message)
    elif fault == "slow":
        test_waiting_lets_others_run(engine_of(kind, Path(folder)))
    elif fault:
        wrong = fault in ("truncated", "damaged", "another-k")
        root = spoiled(Path(folder), fault) if wrong else Path(folder)
        test_fault(lambda: engine_of(kind, root), fault)
    else:
        if kind != "wrapper":
            test_module(module_of(kind), Path(folder))
        test_engine(engine_of(kind, Path(folder)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # as any program ends: a command that hangs neither keeps it nor makes it crash
