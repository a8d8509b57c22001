"""The native quantizer gives the bits of the plain-torch reference, on every instruction set."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import pytest
import torch

from unicorn_backend.layouts import dequantize
from unicorn_backend.quantize import schemes

REFERENCES = schemes.REFERENCES
SHAPES = ((1, 1), (3, 7), (16, 32), (17, 33), (31, 95), (48, 640), (33, 1152))

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        yield torch.ops.unicorn.quantize_isa(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    finally:
        torch.ops.unicorn.quantize_isa("")


def _weights(shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Normal, heavy-tailed, one-sided, tiny, huge, and with dead rows and groups."""
    w = torch.randn(shape)
    yield w
    yield w**3
    yield w.abs() + 0.1
    yield w * 1e-7  # fp16 subnormal scales
    yield w * 1e-38
    yield w * 3e37 / w.abs().max()
    dead = w.clone()
    dead[::2], dead[:, : shape[1] // 2] = 0.0, -0.0
    yield dead
    yield torch.randint(-8, 9, shape) / 8.0  # ties


@functools.cache
def _expected(scheme: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Weights and what the reference (slow: once for all instruction sets) makes of them."""
    cases = []
    for shape in SHAPES:
        for weight in _weights(shape):
            w = weight.clamp(-6e4, 6e4).to(dtype) if dtype is torch.float16 else weight.to(dtype)
            cases.append((w, REFERENCES[scheme](w)))
    return cases


@pytest.mark.parametrize("scheme", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits(isa: str, scheme: str, dtype: torch.dtype) -> None:
    for case, (w, wanted) in enumerate(_expected(scheme, dtype)):
        for got, want in zip(schemes.quantize_weight(w, scheme), wanted, strict=True):
            assert got.dtype == want.dtype and torch.equal(_bits(got), _bits(want)), (isa, w.shape, case)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: torch.equal takes -0.0 for 0.0."""
    return tensor.view(torch.uint8)


def test_bits_on_a_grid(isa: str) -> None:
    """bf16 weights that are a grid's rounding, in every second group; scales from subnormal to large, of both signs."""
    scale = torch.randn(33, 12, 1) * torch.tensor([1e-7, 1e-4, 1.0, 1e4])[torch.randint(0, 4, (33, 12, 1))]
    grid = scale.half().float() * torch.randint(-8, 8, (33, 12, 32))
    grid[:, ::2] += torch.randn(33, 6, 32) * grid[:, ::2].abs().amax()
    w = grid.view(33, 384).bfloat16()
    for importance in (None, torch.rand(384) + 0.1):
        got, want = schemes.quantize_weight(w, "w4g32", importance), REFERENCES["w4g32"](w, importance)
        assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(got, want, strict=True)), isa


@pytest.mark.parametrize("scheme", schemes.SEARCHED)
def test_bits_with_importance(isa: str, scheme: str) -> None:
    """Weights of the columns over five orders of magnitude; a part of a super block, and of a group."""
    for n, k in ((3, 7), (17, 33), (31, 300), (16, 512)):
        w, importance = torch.randn(n, k), 10 ** (5 * torch.rand(k) - 3)
        got, want = schemes.quantize_weight(w, scheme, importance), REFERENCES[scheme](w, importance)
        assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(got, want, strict=True)), (isa, n, k)


@pytest.mark.parametrize("scheme", schemes.SEARCHED)
def test_equal_importance_changes_nothing(scheme: str) -> None:
    w = torch.randn(32, 256)
    plain, weighted = schemes.quantize_weight(w, scheme), schemes.quantize_weight(w, scheme, torch.ones(256))
    assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(plain, weighted, strict=True))


@pytest.mark.parametrize("scheme", schemes.SEARCHED)
def test_importance_moves_the_error(scheme: str) -> None:
    """A third of the columns counts 100 times: their error falls, that of the others rises."""
    w, importance = torch.randn(64, 512), torch.ones(512)
    importance[::3] = 100.0
    plain, weighted = (
        (dequantize(schemes.quantize_weight(w, scheme, h), 64, 512) - w).square().mean(0) for h in (None, importance)
    )
    heavy = importance > 1
    assert weighted[heavy].mean() < 0.97 * plain[heavy].mean() and weighted[~heavy].mean() > plain[~heavy].mean()


def test_importance_of_another_shape() -> None:
    for wrong in (torch.ones(31), torch.ones(1, 32), torch.ones(32).double()):
        with pytest.raises(RuntimeError, match=r"expected importance as fp32 \[32\]"):
            torch.ops.unicorn.quantize_q4k(torch.randn(4, 32), wrong)


@pytest.mark.parametrize("scheme", REFERENCES)
def test_noise(isa: str, scheme: str) -> None:
    """fp32 sums within a group (32 squares: 2^-19 relative at most), fp64 above."""
    for n, k in ((17, 33), (31, 300)):
        w = torch.randn(n, k)
        packed = schemes.quantize_weight(w, scheme)
        got, want = schemes.quantization_noise(w, packed), schemes.quantization_noise_reference(w, packed)
        assert got == pytest.approx(want, rel=1e-5), (isa, n, k)
    with pytest.raises(RuntimeError, match="do not belong to a weight"):
        schemes.quantization_noise(torch.randn(n, 2 * k), packed)


@pytest.mark.parametrize("scheme", REFERENCES)
def test_strided_rows(isa: str, scheme: str) -> None:
    """A row range or a column range of a wider weight, and a transposed one."""
    wide = torch.randn(96, 96, dtype=torch.bfloat16)
    for w in (wide[:, 32:72], wide[7:40], wide.t(), wide[::2]):
        for got, want in zip(schemes.quantize_weight(w, scheme), REFERENCES[scheme](w.contiguous()), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("scheme", REFERENCES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0), (16, 32), (8, 31), (15, 5)])
def test_not_finite(isa: str, scheme: str, bad: float, at: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.randn(17, 33).to(dtype)
        w[at] = bad
        assert torch.ops.unicorn.count_nonfinite(w) == 1
        with pytest.raises(ValueError, match="1 of 561 elements are NaN or Inf"):
            schemes.quantize_weight(w, scheme)


def test_thread_count_does_not_matter() -> None:
    w, threads = torch.randn(333, 700), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([t for scheme in REFERENCES for t in schemes.quantize_weight(w, scheme)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_speed() -> None:
    """A floor that a plain-torch fallback (some 30 MB/s) cannot reach; the benchmark has the numbers."""
    w = torch.randn(2048, 4096).to(torch.bfloat16)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        schemes.quantize_weight(w, "w4g32")
        seconds.append(time.perf_counter() - start)
    assert w.nbytes / min(seconds) > 150e6
