"""Run by tests in a process of its own, under the validation layer or on a newer driver: `python -m ... NAME`."""

from __future__ import annotations

import sys
from typing import Any

from tests.runtime import test_vulkan_linear as linear
from tests.runtime import test_vulkan_qkv as qkv
from tests.runtime.test_vulkan_ffn import arguments, check, run
from unicorn_backend import runtime
from unicorn_backend.runtime.vulkan import device as vulkan_device
from unicorn_backend.runtime.vulkan import ffn, physical, variants
from unicorn_backend.runtime.vulkan.device import VulkanDevice
from unicorn_backend.runtime.vulkan.logical import LogicalDevice


def clean(*placings: str) -> None:
    """Every kind of call: all forms, placings and types of memory, weights that come and go, an orderly end."""
    (found,) = physical.devices()
    for placing in placings:
        device = VulkanDevice("vulkan", found, placing="" if placing == "own" else placing)
        for m in (1, 2, 3, 8, 70):
            run(device, arguments(m, 96, 160, 96, own=m == 3))
        run(device, arguments(1, 50, 77, 34, dtype=ffn.torch.float32, norms=False))
        for m in (1, 3, 70):
            qkv.run(device, qkv.arguments(1, m, 50, (3, 1, 20), bias=m == 3))
            linear.run(device, linear.arguments(m, 50, 78, "w8a" if m > 1 else "w8c", bias=m == 3))
        device.close()


def matrix() -> None:
    """Cooperative matrices on a driver that has them: bounds, the self-test, and what happens when it fails."""
    device: Any = runtime.open_device("vulkan:0")
    assert not isinstance(device, str) and device.variant.name == "matrix", device
    bf16, f16, f32 = ffn.torch.bfloat16, ffn.torch.float16, ffn.torch.float32
    for m, k, f, n, act, dtype in ((67, 128, 192, 128, "gelu_tanh", bf16), (13, 33, 47, 13, "silu", f32)):
        check(device, arguments(m, k, f, n, act, dtype, own=n != k))
    check(device, arguments(67, 1152, 6912, 1152))
    for m, k, n, scheme, dtype in ((131, 160, 194, "w8a", bf16), (67, 40, 75, "w8a", f32), (13, 70, 90, "w8c", f16)):
        linear.check(device, linear.arguments(m, k, n, scheme, dtype, bias=n == 90))
    linear.check(device, linear.arguments(13, 1152, 4096, "w8a"))
    qkv.check(device, qkv.arguments(1, 19, 50, (3, 1, 20), bias=True))
    extremes(device)
    runtime.close_devices()

    plain = vulkan_device.compare_with_cpu
    vulkan_device.compare_with_cpu = lambda tested: "bad matrices" if tested.variant.matrix else plain(tested)
    device = runtime.open_device("vulkan:0")
    assert not isinstance(device, str) and device.variant.name == "dot8_subgroup", device
    assert device.passed_over == "bad matrices"
    check(device, arguments(67, 64, 96, 64))
    runtime.close_devices()


def unsupported() -> None:
    """On purpose: matrices of a size that the driver does not list."""
    (found,) = physical.devices()
    device = VulkanDevice("vulkan", found)
    shape = ffn.Call(*arguments(13, 64, 96, 64)).shape
    variants.matrix_shape = lambda features: physical.MatrixShape(16, 16, 16)
    device.kernels(shape).pipeline("down", 0)


def extremes(device: Any) -> None:
    """The largest sums of a group that there are: one unit of them is 1e-6."""
    w, s, z = linear.weight(16, 32, "w8a", ffn.torch.Generator())
    w[0, :, :, :8], w[0, :, :, 8:], z[0, :8], z[0, 8:] = 255, 0, 0, 255
    args = (ffn.torch.full((9, 32), 127.0), [w, s.fill_(2.0**-10), z], None, 16)
    sizes = ffn.torch.full((8,), 32 * 127 * 255 * 2.0**-10)
    want = ffn.torch.cat([sizes, -sizes]).expand(9, 16)
    assert ((linear.run(device, args) / want - 1).abs() <= 3e-7).all()


def wrong() -> None:
    """On purpose: a buffer of scales with four values, and dispatches with nothing between them."""
    (found,) = physical.devices()
    ffn.norm_scale = lambda w, offset, width: ffn.torch.ones(4)
    run(VulkanDevice("vulkan", found), arguments(1, 96, 160, 96))
    _barrierless: Any = lambda self, command, stage, access: None  # noqa: E731
    LogicalDevice._barrier = _barrierless  # type: ignore[method-assign]
    run(VulkanDevice("vulkan", found), arguments(1, 96, 160, 96))


if __name__ == "__main__":
    {"clean": clean, "matrix": matrix, "unsupported": unsupported, "wrong": wrong}[sys.argv[1]](*sys.argv[2:])
    print("done")
