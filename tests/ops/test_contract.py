"""Schemas, fakes and dispatch (torch.library.opcheck), error messages, and the refusal of gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.ops.support import make_weight
from tests.ops.test_regions import ffn_args, qkv_args

OPS = torch.ops.unicorn


def calls() -> dict[str, tuple[Any, ...]]:
    """One call of every op."""
    w, x = make_weight(32, 64, "w4g32"), torch.randn(2, 3, 64).bfloat16()
    heads = torch.randn(2, 4, 3, 16).bfloat16()
    ffn = ffn_args(3, 64, 96, 48, ("w4g32", "w8c", "w8a"), torch.bfloat16, pre=True, post=True, residual=True)
    qkv = qkv_args(2, 3, 64, (4, 2, 16), "w8c", torch.bfloat16, pre=True, norm=True, rotary=True)
    kv = heads[:, :2].contiguous()
    return {
        "linear": (x, w, torch.randn(32), 32),
        "embedding": (torch.tensor([[1, 2]]), w, 32, 64, torch.bfloat16),
        "rms_norm": (x, torch.randn(64), 1e-6, 1.0),
        "int8_qkv": tuple(qkv),
        "int8_attention": (heads, kv, kv + 1, None, True, 0.25, 0.0, w, None, 32, torch.rand(32), 1e-6, 0.0, None),
        "int4_ffn": tuple(ffn),
        "sparse_ffn": (*ffn, 0.5),
    }


@pytest.mark.parametrize("op", list(calls()))
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(OPS, op).default, calls()[op])


@pytest.mark.parametrize("op", [name for name in calls() if name != "embedding"])
def test_gradients_are_refused(op: str) -> None:
    args = list(calls()[op])
    args[0] = args[0].float().requires_grad_()
    args = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
    with pytest.raises(RuntimeError, match=r"inference only.*torch\.inference_mode\(\).*requires_grad_\(False\)"):
        getattr(OPS, op)(*args)
    with torch.no_grad():
        getattr(OPS, op)(*args)
    with torch.inference_mode():
        getattr(OPS, op)(*args)


def test_gradients_in_weight_lists_are_refused() -> None:
    w = [make_weight(32, 64, "float32")[0].requires_grad_()]
    with pytest.raises(RuntimeError, match="inference only"):
        OPS.linear(torch.randn(2, 64), w, None, 32)


@pytest.mark.parametrize("bad", [-1, 32, 2**40])
def test_embedding_names_the_bad_id(bad: int) -> None:
    with pytest.raises(IndexError, match=str(bad)):
        OPS.embedding(torch.tensor([0, bad]), make_weight(32, 64, "w8c"), 32, 64, torch.float32)


def test_wrong_arguments() -> None:
    w, x = make_weight(32, 64, "w4g32"), torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="linear"):
        OPS.linear(torch.randn(2, 96), w, None, 32)  # K of x and w differ
    with pytest.raises(RuntimeError, match="linear"):
        OPS.linear(x, w, None, 48)  # another N
    with pytest.raises(RuntimeError, match="linear"):
        OPS.linear(x, [w[0], w[1].float()], None, 32)
    with pytest.raises(RuntimeError, match="linear"):
        OPS.linear(x, w, torch.randn(31), 32)
    with pytest.raises(RuntimeError, match=r"Double|float64"):
        OPS.linear(x.double(), w, None, 32)
    args = list(calls()["int4_ffn"])
    args[8] = "tanh"
    with pytest.raises((RuntimeError, ValueError), match="tanh"):
        OPS.int4_ffn(*args)


def test_unknown_instruction_set() -> None:
    with pytest.raises((RuntimeError, ValueError), match="sse9"):
        OPS.set_isa("sse9")


def test_a_thread_lets_its_helpers_go_and_finds_new_ones() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    w, x = make_weight(512, 512, "w4g32"), torch.randn(64, 512)
    first, there = OPS.linear(x, w, None, 512), threads()
    OPS.release_threads()
    assert threads() < there
    assert torch.equal(OPS.linear(x, w, None, 512), first) and threads() == there
    torch.set_num_threads(before)
