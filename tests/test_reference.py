"""The compiled, quantized model against plain torch on the same packed weights.

The rewritten graph is run twice on the same inputs: by the native kernels, and by an interpreter that
replaces every `unicorn::` op by its plain-torch meaning (integer sums exact, floats in fp64).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unicorn_backend
from tests.graph.tracing import trace
from unicorn_backend.reference import Interpreter


@pytest.mark.parametrize("recipe", ["default", "q4", "int8"])
def test_logits_equal_the_reference_of_the_same_weights(recipe: str, tiny: Any, sample_ids: torch.Tensor) -> None:
    """Bound: each op rounds to bf16 once; where fp32 and fp64 land on two sides of a rounding point, a value
    moves by one bf16 step (2^-8 relative), at most once per op that writes the residual stream (two per
    layer) and once at the head, and each step may move an int8 activation by one of its 127 steps, which is
    as large again. The bound must be far below what quantization itself changes in a logit's spread.
    """
    layers = tiny.config.num_hidden_layers
    unicorn_backend.quantize(tiny, recipe)
    ids = sample_ids[:, :48]
    gm, match, inputs = trace(tiny.forward, input_ids=ids, use_cache=False)[0]
    assert len(match.regions) == 3 * layers
    with torch.no_grad():
        got = gm(*inputs)
        want = Interpreter(gm).run(*inputs)
    logits = [(g, w) for g, w in zip(got, want, strict=True) if isinstance(g, torch.Tensor) and g.dim() == 3]
    got_logits, want_logits = (t.float() for t in logits[-1])
    bound = 2 * (2 * layers + 1) * 2**-8 * want_logits.abs().max()
    assert (got_logits - want_logits).abs().max() <= bound < 2 * want_logits.std()
    top = want_logits.topk(2, -1).values
    clear = (top[..., 0] - top[..., 1]) > 2 * bound
    assert clear.any()
    assert torch.equal(got_logits.argmax(-1)[clear], want_logits.argmax(-1)[clear])
