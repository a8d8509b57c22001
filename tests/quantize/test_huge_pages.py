"""Packed weights move into one block; values, ties and saved files stay."""

import copy

import torch
from torch import nn

import unicorn_backend
from unicorn_backend import models
from unicorn_backend.assets import load_native
from unicorn_backend.quantize.memory import into_huge_pages

load_native()
ARENA = torch.classes.unicorn.Arena


def test_values_ties_and_files_stay(tmp_path):
    model = models.load()
    unicorn_backend.quantize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = into_huge_pages(model)
    assert moved == sum(t.nbytes for n, t in before.items() if "packed" in n or "scale" in n or "zero_point" in n)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert ARENA.holds(model.lm_head.weight_packed)
    assert into_huge_pages(model) == 0  # nothing left to move
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
    assert into_huge_pages(model) == 0
