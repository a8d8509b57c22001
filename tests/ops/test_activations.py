"""Accuracy of the activation functions in the kernels, over all finite sizes."""

from __future__ import annotations

import pytest
import torch

from tests.ops.support import ACTIVATION_ERROR
from unicorn_backend.ops import ACTIVATIONS
from unicorn_backend.reference import ACTIVATIONS as EXACT


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_accuracy(isa: str, act: str) -> None:
    sizes = torch.logspace(-30, 30, 1 << 10)
    x = torch.cat((torch.linspace(-20, 20, 1 << 16), sizes, -sizes))
    got, want = torch.ops.unicorn.activate(x, act).double(), EXACT[act](x.double())
    assert got.isfinite().all()
    assert ((got - want).abs() <= ACTIVATION_ERROR * x.double().abs()).all()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_nan(isa: str, act: str) -> None:
    assert torch.ops.unicorn.activate(torch.full((16,), float("nan")), act).isnan().all()
