"""The schemes: how much noise they add, edge values, and that the bytes are what the contract says."""

from __future__ import annotations

import pytest
import torch

from unicorn_backend.errors import OptionError
from unicorn_backend.layouts import (
    CODEBOOK,
    GROUP,
    PARTS,
    SCHEMES,
    dequantize,
    empty_packed,
    unpack,
    unpack_w4g32,
    unpack_w8,
)
from unicorn_backend.quantize.rewrite import sqnr_db
from unicorn_backend.quantize.schemes import quantize_weight

SHAPES = ((1, 1), (16, 32), (17, 33), (5, 100), (48, 64))

# dB on N(0, 1) [512, 1024]; a deviation either way means that the measurement or the scheme changed
BANDS = {"w8c": 42.0, "w8a": 42.6, "w8g32": 45.5, "w4g32": 21.8, "w4n32": 22.7}
BANDS |= {"w4m32": 23.2, "q4k": 23.1, "q5k": 29.2, "q6k": 35.6}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_noise_is_in_its_band(scheme: str) -> None:
    w = torch.randn(512, 1024)
    assert sqnr_db(w, quantize_weight(w, scheme)) == pytest.approx(BANDS[scheme], abs=1.0)


def test_w4g32_beats_a_single_scale_by_amax() -> None:
    """ggml's Q4_0: the largest weight becomes -8. Its error on N(0, 1) is 8.6 %, the searched scale's 8.1 %."""
    w = torch.randn(256, 1024)
    x = w.view(-1, GROUP)
    scale = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    plain = (scale.half().float() * torch.round(x / scale).clamp(-8, 7)).view_as(w)
    searched = dequantize(quantize_weight(w, "w4g32"), *w.shape)
    errors = [float((y - w).norm() / w.norm()) for y in (plain, searched)]
    assert errors[0] == pytest.approx(0.0862, abs=0.001)
    assert errors[1] == pytest.approx(0.0811, abs=0.001)


def test_padding_rows_of_a_codebook_without_zero() -> None:
    """Columns past K may hold anything: the activations there are zero. So it is with minima."""
    assert not dequantize(quantize_weight(torch.randn(17, 33), "w4n32"), 32, 64)[17:].any()


def test_w4n32_beats_its_codebook_by_amax() -> None:
    """GGUF's IQ4_NL without a search: the largest weight becomes -127, and every weight its nearest value."""
    w = torch.randn(256, 1024)
    x, table = w.view(-1, GROUP), torch.tensor(CODEBOOK, dtype=torch.float32)
    scale = x.gather(1, x.abs().argmax(1, keepdim=True)) / -127
    plain = (scale * table[((x / scale)[..., None] - table).abs().argmin(-1)]).view_as(w)
    searched = dequantize(quantize_weight(w, "w4n32"), *w.shape)
    errors = [float((y - w).norm() / w.norm()) for y in (plain, searched)]
    assert errors[0] == pytest.approx(0.0792, abs=0.001)
    assert errors[1] == pytest.approx(0.0736, abs=0.001)


@pytest.mark.parametrize(("scheme", "llama_cpp"), [("q4k", 0.07142), ("q5k", 0.03608), ("q6k", 0.01771)])
def test_kquants_beat_llama_cpps_search(scheme: str, llama_cpp: float) -> None:
    """Relative errors of ggml_quantize_chunk without importance weights on N(0, 1) [256, 2048]."""
    w = torch.randn(256, 2048)
    error = float((dequantize(quantize_weight(w, scheme), *w.shape) - w).norm() / w.norm())
    assert 0.9 * llama_cpp < error < 0.99 * llama_cpp


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_are_the_contracts(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    packed, wanted = quantize_weight(w, scheme), empty_packed(*shape, scheme, "meta")
    assert [(t.shape, t.dtype) for t in packed] == [(t.shape, t.dtype) for t in wanted]
    step = unpack(packed, *shape)[1].abs().max()
    step *= {"w4g32": 1.01, "w4n32": 30, "w4m32": 3, "q4k": 3, "q5k": 4, "q6k": 256}.get(scheme, 0.51)
    assert (dequantize(packed, *shape) - w.float()).abs().max() <= step


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_agrees(scheme: str) -> None:
    op = getattr(torch.ops.unicorn, f"quantize_{scheme}").default
    torch.library.opcheck(
        op, (torch.randn(17, 33, dtype=torch.bfloat16),), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("scheme", ["w4g32", "w8c", "w8a", "w8g32"])
def test_padding_means_zero(scheme: str) -> None:
    packed = quantize_weight(torch.randn(17, 33), scheme)
    whole = dequantize(packed, 32, 64)
    assert not whole[17:].any() and not whole[:, 33:].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_rows_and_constant_rows(scheme: str) -> None:
    w = torch.zeros(4, 64)
    w[1], w[2], w[3, 5] = 0.5, -0.25, 1e-30
    back = dequantize(quantize_weight(w, scheme), 4, 64)
    assert not back[0].any()
    torch.testing.assert_close(back[:3], w[:3], rtol=1e-3, atol=0)
    assert back[3].abs().max() <= 1e-29


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("largest", [3e38, 6e4, 1e-20, 1e-38])
def test_extreme_ranges_stay_finite(scheme: str, largest: float) -> None:
    w = torch.randn(16, 64)
    w = w / w.abs().max() * largest
    assert torch.isfinite(dequantize(quantize_weight(w, scheme), 16, 64)).all()


def test_w8c_is_symmetric_and_exact_at_the_ends() -> None:
    w = torch.randn(16, 64)
    q, scale, zero = unpack_w8(quantize_weight(w, "w8c"), 16, 64)
    assert zero is None and int(q.min()) >= 1
    torch.testing.assert_close(scale, w.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert ((q.int() - 128).abs().amax(1) == 127).all()


def test_w8a_keeps_zero_exact_and_uses_one_sided_ranges() -> None:
    w = torch.rand(16, 64)
    w[:, 0] = 0.0
    packed = quantize_weight(w, "w8a")
    assert not dequantize(packed, 16, 64)[:, 0].any()
    assert sqnr_db(w, packed) > sqnr_db(w, quantize_weight(w, "w8c")) + 5  # one more bit is 6 dB


def test_w4g32_uses_both_signs_of_the_scale() -> None:
    """-8 is at the end of the group's largest weight, whichever sign that has."""
    w = torch.randn(64, 256)
    q, scale = unpack_w4g32(*quantize_weight(w, "w4g32"), 64, 256)
    assert q.min() == -8 and q.max() == 7
    assert 0.2 < float((scale < 0).float().mean()) < 0.8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_do_not_depend_on_their_neighbours(scheme: str) -> None:
    w = torch.randn(48, 96)
    whole, part = quantize_weight(w, scheme), quantize_weight(w[16:32], scheme)
    for part_of, a, b in zip(PARTS[scheme], whole, part, strict=True):
        assert torch.equal(a[1:2] if part_of.tiled else a, b), scheme


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(scheme: str, bad: float) -> None:
    w = torch.randn(20, 40, dtype=torch.bfloat16)
    w[19, 39] = bad
    assert torch.ops.unicorn.count_nonfinite(w) == 1
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_weight(w, scheme)


def test_unknown_scheme() -> None:
    with pytest.raises(OptionError, match="w4g32"):
        quantize_weight(torch.randn(2, 2), "int3")
