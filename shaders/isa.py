#!/usr/bin/env python3
"""What Mesa's compiler makes of every shader for gfx1103, the Radeon 780M: registers, spills, instructions.

    python shaders/isa.py              print
    python shaders/isa.py --write      write shaders/gfx1103.json

No GPU is needed: Mesa's RADV driver compiles for a device that is not there. Nothing runs, so these are no
measurements of speed. The driver is that of `python3 shaders/newer_debian.py`, else this system's.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import newer_debian

RECORD = Path(__file__).parent / "gfx1103.json"
DRIVER = Path("/usr/share/vulkan/icd.d/radeon_icd.x86_64.json")
NEWER = "trixie"  # Mesa 25.0; from 26 on it needs a simulated kernel driver
FAMILIES = ("phoenix", "gfx1103_r1")  # what Mesa calls it, newer and older
LAYERS = {"gemma3-1b": (1152, 6912), "gemma3-4b": (2560, 10240)}  # hidden and intermediate size
COUNTED = ("v_dot4", "v_wmma", "scratch_", "buffer_load", "ds_")
NAMES = {"vgprs": "VGPRs", "spilled_vgprs": "Spilled VGPRs", "spilled_sgprs": "Spilled SGPRs", "lds_bytes": "LDS size"}


def main() -> None:
    family = os.environ.get("RADV_FORCE_FAMILY")
    if family is None:
        _with_the_driver()
    from unicorn_backend.runtime.vulkan.physical import devices

    (physical,) = devices()
    from unicorn_backend.runtime.vulkan.logical import LogicalDevice

    device = LogicalDevice(physical, statistics=True)
    found = {name: _statistics(device, pipeline) for name, pipeline in _pipelines(device)}
    result = {
        "driver": physical.driver,
        "family": family,
        "subgroup_size": physical.features.subgroup_size,
        "pipelines": found,
    }
    text = json.dumps(result, indent=1) + "\n"
    if "--write" in sys.argv[1:]:
        RECORD.write_text(text)
    print(text)


def _with_the_driver() -> None:
    """This script again, seeing nothing but a RADV that pretends."""
    newer = newer_debian.root(NEWER) is not None
    path = newer_debian.driver(NEWER, "radeon") if newer else str(DRIVER)
    python = newer_debian.command(NEWER, sys.executable) if newer else [sys.executable]
    env = {k: v for k, v in os.environ.items() if k != "VK_DRIVER_FILES"}
    env |= {"VK_ICD_FILENAMES": path, "UNICORN_CACHE": "0", "RADV_FORCE_FAMILY": FAMILIES[0 if newer else 1]}
    os.execve(python[0], [*python, *sys.argv], env)


def _pipelines(device: Any) -> Any:
    """Name and pipeline of every build that the driver takes, for each number of tokens and layers of two models."""
    from unicorn_backend.runtime.vulkan import ffn, kernels, linear, qkv, variants

    for model, (hidden, width) in LAYERS.items():
        shape = ffn.Shape(hidden, width, hidden, "gelu_tanh", ffn.torch.bfloat16, 1e-6, 1e-6, "x")
        for variant in variants.VARIANTS:
            if variant.missing(device.physical.features):
                continue
            made = _without_buffers(ffn.FfnKernels, device, variant, shape)
            products = {which: functools.partial(made.pipeline, which) for which in ("gate_up", "down")}
            for scheme, zero in (("w8c", False), ("w8a", True)):
                products[f"linear {scheme}"] = functools.partial(_linear, made, hidden, zero, linear)
            for which, product in products.items():
                for tokens in kernels.BUCKETS if not variant.matrix else ():  # which has the GEMVs of the next
                    yield f"{model} {which} {variant.name} {tokens}", product(tokens)
                if variant.subgroup:
                    yield f"{model} {which} gemm {'matrix' if variant.matrix else variant.dot}", product(kernels.BLOCK)
                if variant.matrix:
                    yield f"{model} {which} gemm matrix large", product(0)
        yield f"{model} norm_quant", made.row_pipeline("norm_quant", hidden, 1e-6)
        heads = qkv.Shape(
            hidden, 8, 4, 256, ffn.torch.bfloat16, 1e-6, 1e-6, False, 256, ffn.torch.bfloat16, False, False
        )
        yield f"{model} heads", _without_buffers(qkv.QkvKernels, device, variant, heads).heads()
        yield f"{model} norm_add", made.row_pipeline("norm_add", hidden, 1e-6, (5, 1))


def _linear(made: Any, hidden: int, zero: bool, linear: Any, bucket: int) -> Any:
    """The head of a vocabulary of 262,144, or a projection with a bias."""
    rows = 1 << 18 if zero else 2048
    piece = linear.Piece(0, rows, (None,) * (3 if zero else 2))
    target = linear.Target(1, not zero, 0, rows)
    (stage,) = linear.product_stages(made, [piece], (), (hidden, rows), target, bucket)
    return stage.pipeline


def _without_buffers(kind: Any, device: Any, variant: Any, shape: Any) -> Any:
    """Kernels that can only compile: there is no memory."""
    made = kind.__new__(kind)
    made.device, made.variant, made.shape = device, variant, shape
    return made


def _statistics(device: Any, pipeline: Any) -> dict[str, int]:
    from unicorn_backend.runtime.vulkan.api import Structs, extension_function, several, text

    info = Structs().new("VkPipelineExecutableInfoKHR", pipeline=pipeline)
    function = extension_function("vkGetPipelineExecutableStatisticsKHR", device=device.handle)
    numbers = several(function, "VkPipelineExecutableStatisticKHR", device.handle, info)
    values = {text(n.name).lower(): int(n.value.u64) for n in numbers}
    words = Counter(re.findall(r"^\s*([a-z]\w+)", _assembly(device, info), re.MULTILINE))
    counts = {name: sum(n for word, n in words.items() if word.startswith(name)) for name in COUNTED}
    return {name: values[theirs.lower()] for name, theirs in NAMES.items()} | counts


def _assembly(device: Any, info: Any) -> str:
    from unicorn_backend.runtime.vulkan.api import extension_function, ffi, several, text

    function = extension_function("vkGetPipelineExecutableInternalRepresentationsKHR", device=device.handle)
    parts = several(function, "VkPipelineExecutableInternalRepresentationKHR", device.handle, info)
    array = ffi.new("VkPipelineExecutableInternalRepresentationKHR[]", len(parts))
    kept = []
    for i, part in enumerate(parts):
        array[i] = part
        kept.append(ffi.new("char[]", part.dataSize + 1))
        array[i].pData = kept[-1]
    function(device.handle, info, ffi.new("uint32_t *", len(parts)), array)
    return next(text(kept[i]) for i in range(len(parts)) if "ssembly" in text(array[i].name))


if __name__ == "__main__":
    main()
