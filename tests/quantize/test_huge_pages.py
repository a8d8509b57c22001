"""Packed weights move into one block; values, ties and saved files stay."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import unicorn_backend
from unicorn_backend import measure, models
from unicorn_backend.assets import load_native
from unicorn_backend.quantize import memory
from unicorn_backend.quantize.memory import MappedFiles, Placement, into_huge_pages, left_in_files

load_native()
ARENA = torch.classes.unicorn.Arena


def test_values_ties_and_files_stay(tmp_path):
    model = models.load()
    unicorn_backend.quantize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = sum(t.nbytes for n, t in before.items() if "packed" in n or "scale" in n or "zero_point" in n)
    assert into_huge_pages(model) == Placement(moved, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert ARENA.holds(model.lm_head.weight_packed)
    assert into_huge_pages(model) == Placement(0, 0)  # nothing left to move
    model.save_pretrained(tmp_path)
    assert not ARENA.holds(copy.deepcopy(model).lm_head.weight_packed)


def test_the_block_lives_as_long_as_one_of_its_tensors():
    block = ARENA([1 << 22, 1 << 22])
    first, second = block.place(torch.ones(1 << 20)), block.place(torch.full((1 << 20,), 2.0))
    del block, first
    assert second.sum() == 2 << 20


def test_small_models_stay_where_they_are():
    model = nn.Sequential(nn.Linear(64, 64))
    unicorn_backend.quantize(model)
    assert into_huge_pages(model) == Placement(0, 0)


@pytest.fixture
def saved(tmp_path):
    """A folder with the embedded model packed."""
    model = models.load()
    unicorn_backend.quantize(model)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_what_ram_has_no_room_for_stays_in_its_file(saved, share):
    model = AutoModelForCausalLM.from_pretrained(saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = into_huge_pages(AutoModelForCausalLM.from_pretrained(saved)).moved
    placement = into_huge_pages(model, room=int(share * total))
    assert placement.moved + placement.left == total
    assert placement.moved == pytest.approx(share * total, abs=0.02 * total)
    assert left_in_files(model) == placement.left
    assert into_huge_pages(model) == Placement(0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    files = MappedFiles()
    assert all(files.holds(b) for b in model.buffers() if ARENA.left(b))
    assert not any(ARENA.left(b) for b in copy.deepcopy(model).buffers())


def test_weights_in_files_give_the_same_logits(saved, monkeypatch):
    ids = torch.arange(3, 15).unsqueeze(0)
    expected = torch.compile(AutoModelForCausalLM.from_pretrained(saved), backend="unicorn")(ids).logits
    monkeypatch.setattr(measure, "ram", lambda: (1 << 30, 0))
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="unicorn")(ids).logits, expected)
    assert left_in_files(model) > 2 << 20
    assert "are read from the disk by every call" in str(unicorn_backend.explain(model).memory)


def test_what_stays_is_spread_and_large_tables_are_the_last(monkeypatch):
    monkeypatch.setattr(memory, "_LARGE", 5000)
    monkeypatch.setattr(MappedFiles, "holds", lambda *_: True)
    layers = {i: torch.empty(1000, dtype=torch.uint8) for i in range(50)}
    staying = sorted(memory._without_room(layers, room=35_000))
    assert len(staying) == 15 and {b - a for a, b in itertools.pairwise(staying)} == {3, 4}
    tensors = {i: torch.empty(n, dtype=torch.uint8) for i, n in enumerate([6000, 1000, 1000, 2000, 8000])}
    assert memory._without_room(tensors, room=18_000) == {}
    assert set(memory._without_room(tensors, room=14_000)) == {1, 2, 3}
    assert set(memory._without_room(tensors, room=8_000)) == {1, 2, 3, 4}
    assert set(memory._without_room(tensors, room=-1)) == set(tensors)
