"""The NPU of AMD laptops through XRT: int8 projections and integer attention of prompts.

regions ── float work of int8_qkv and int8_attention on the host, integers to an engine
engine ─── products and attentions out of launches; self-test; the same in NumPy
xrt ────── our C wrapper over libxrt, or pyxrt, or the emulator
designs ── sizes and limits of the kernels;  arithmetic: what they compute;  pack: their bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicorn_backend.runtime.npu.device import NpuDevice


def open_device(selector: str) -> NpuDevice | str:
    """The NPU, or its emulator where UNICORN_NPU_EMULATE asks for it; or why there is none."""
    from unicorn_backend.options import npu_emulated, npu_folder
    from unicorn_backend.runtime.npu import machine
    from unicorn_backend.runtime.npu.artifacts import EMULATED
    from unicorn_backend.runtime.npu.device import NpuDevice, target_of
    from unicorn_backend.runtime.npu.xrt import PyXrt, XrtError, find_xrt

    if selector and not selector.isdigit():
        return f"got npu:{selector}, allowed is a number: npu or npu:0"
    root = npu_folder()
    if generation := npu_emulated():
        from unicorn_backend.runtime.npu import emulator

        emulator.generation = generation
        try:
            return NpuDevice(PyXrt(emulator, "the emulator"), root / EMULATED, emulated=True)
        except XrtError as error:
            return str(error)
    found = find_xrt(root, int(selector or 0))
    if isinstance(found, str):
        return "; ".join(filter(None, (machine.problem(), found)))
    if not target_of(found.name):
        return f"{found.name} is none of the NPUs that there are kernels for (XDNA 1 and 2)"
    if not any(root.glob("*/manifest.json")):
        return f"{found.label} is there, but no kernels are in {root}: build them with kernels/build.py (docs/npu.md)"
    return NpuDevice(found, root)
