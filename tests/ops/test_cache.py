"""Growing KV rows: the values of torch.cat, without copying, and without ever changing an older result."""

import gc

import pytest
import torch

from unicorn_backend import reference
from unicorn_backend.assets import load_native

load_native()
APPEND, LAST = torch.ops.unicorn.append_rows, torch.ops.unicorn.last_rows


def rows(count, *, batch=2, heads=3, width=8, start=0, dtype=torch.bfloat16):
    values = torch.arange(start, start + batch * heads * count * width, dtype=torch.float32)
    return values.view(batch, heads, count, width).to(dtype)


def append(past, new, keep=None):
    size = past.shape[2]
    return APPEND(past, new, size, size if keep is None else keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lanes", [(1, 1), (1, 4), (2, 3)])
def test_appending_is_concatenation(dtype, lanes):
    shape = dict(batch=lanes[0], heads=lanes[1], dtype=dtype)
    expected = rows(5, **shape)
    grown = LAST(expected, 5)
    for step in range(300):  # past several buffers
        new = rows(1 + step % 3, start=step, **shape)
        expected = torch.cat([expected, new], dim=2)
        grown = append(grown, new)
        assert torch.equal(grown, expected)


def test_the_window_moves():
    grown, expected = LAST(rows(2), 2), rows(2)
    for step in range(200):
        new = rows(1, start=step)
        expected = torch.cat([expected[:, :, -6:], new], dim=2)
        grown = append(grown, new, keep=6)
        assert torch.equal(grown, expected)
        assert grown.storage_offset() == 0


def test_appending_copies_only_the_new_rows():
    past = LAST(rows(10), 10)
    grown = append(past, rows(1))
    assert grown.data_ptr() == past.data_ptr()


@pytest.mark.parametrize("lanes", [(slice(0, 1), slice(None)), (slice(1, 2), slice(None)), (slice(None), slice(1, 3))])
def test_some_lanes_of_a_grown_cache(lanes):
    grown = append(LAST(rows(10), 10), rows(1, start=7))
    part, new = grown[lanes], rows(2, start=99)[lanes]
    assert torch.equal(LAST(part, 4), part[:, :, -4:])
    assert torch.equal(append(part, new), torch.cat([part, new], dim=2))
    assert torch.equal(append(grown, rows(1, start=5)), torch.cat([grown, rows(1, start=5)], dim=2))


def test_two_appends_to_one_past_are_independent():
    past = LAST(rows(4), 4)
    first, second = append(past, rows(2, start=100)), append(past, rows(2, start=500))
    assert torch.equal(first, torch.cat([rows(4), rows(2, start=100)], dim=2))
    assert torch.equal(second, torch.cat([rows(4), rows(2, start=500)], dim=2))
    assert torch.equal(past, rows(4))


def test_after_a_crop_the_dropped_rows_are_overwritten_only_if_nobody_shows_them():
    grown = append(LAST(rows(4), 4), rows(3, start=100))
    cropped = LAST(grown[:, :, :4], 4)
    again = append(cropped, rows(1, start=900))
    assert torch.equal(grown, torch.cat([rows(4), rows(3, start=100)], dim=2))  # still shown: kept
    assert torch.equal(again, torch.cat([rows(4), rows(1, start=900)], dim=2))
    address = grown.data_ptr()
    del grown, again
    gc.collect()
    assert append(cropped, rows(1, start=900)).data_ptr() == address  # nobody left: in place


def test_part_of_the_past_is_written():
    past = torch.full((2, 3, 9, 8), 7.0).bfloat16()
    past[:, :, :4] = rows(4)
    grown = APPEND(past, rows(2, start=50), 4, 3)
    assert torch.equal(grown, torch.cat([rows(4)[:, :, 1:], rows(2, start=50)], dim=2))


def test_strided_rows():
    new = rows(6).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(append(LAST(new, 4), new), torch.cat([new[:, :, 2:], new], dim=2))


@pytest.mark.parametrize(
    ("past", "new", "filled"),
    [
        (rows(4), rows(1, width=16), 4),
        (rows(4), rows(1, heads=1), 4),
        (rows(4), rows(1).float(), 4),
        (rows(4), rows(1), 5),
        (rows(4)[0], rows(1)[0], 4),
    ],
)
def test_wrong_arguments(past, new, filled):
    with pytest.raises(RuntimeError, match="append_rows"):
        APPEND(past, new, filled, 4)


def test_copies_and_saving(tmp_path):
    grown = append(LAST(rows(4), 4), rows(1))
    torch.save(grown, tmp_path / "rows.pt")
    assert torch.equal(torch.load(tmp_path / "rows.pt"), grown)
    assert torch.equal(append(grown.clone(), rows(1)), append(grown, rows(1)))


def test_the_window_of_a_static_cache():
    cache, expected = torch.zeros(2, 3, 4, 8).bfloat16(), rows(0)
    for seen in range(9):
        new = rows(1, start=seen)
        expected = torch.cat([expected, new], dim=2)[:, :, -4:]
        torch.ops.unicorn.push_window_(cache, new, seen)
        assert torch.equal(cache[:, :, : expected.shape[2]], expected)
    torch.ops.unicorn.set_window_(cache, rows(7))
    assert torch.equal(cache, rows(7)[:, :, -4:])
    torch.ops.unicorn.set_window_(cache, rows(2, start=30))
    assert torch.equal(cache, torch.cat([rows(2, start=30), rows(7)[:, :, -2:]], dim=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 16, 100])
def test_int8_rows_are_the_references(dtype, width):
    x = (torch.randn(2, 3, 7, width) * torch.logspace(-6, 4, 7)[:, None]).to(dtype)
    x[0, 0, 0] = 0
    x[0, 0, 1, 0], x[0, 1, 1, 0] = torch.nan, torch.inf
    packed = torch.ops.unicorn.quantize_rows(x)
    assert torch.equal(packed[..., :-4], reference.quantize_rows(x)[..., :-4])
    back = torch.ops.unicorn.dequantize_rows(packed, torch.float32)
    assert torch.equal(back.nan_to_num(7), reference.dequantize_rows(reference.quantize_rows(x)).nan_to_num(7))
    lost = ~back.isfinite().all(-1)
    assert lost[0, 0, 1] and lost[0, 1, 1] and lost.sum() == 2  # a row that is not finite stays visible
    step = x.float().abs().amax(-1, keepdim=True) / 127
    assert bool(((back - x.float()).abs() <= step * 0.50001)[~lost].all())


def test_int8_rows_of_other_tensors_are_refused():
    with pytest.raises(RuntimeError, match=r"quantize_rows: got \[2, 3\] Float on cpu, expected \[B, H, T, D\]"):
        torch.ops.unicorn.quantize_rows(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"dequantize_rows: got .* expected what unicorn::quantize_rows gave"):
        torch.ops.unicorn.dequantize_rows(torch.zeros(1, 1, 1, 8), torch.float32)
