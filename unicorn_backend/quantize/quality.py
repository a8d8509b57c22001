"""How close a quantized model is to its float original: KL divergence, top-1 agreement, perplexity.

Perplexity alone does not judge a quantization (a quantization-aware model can beat its bf16 parent), so
the distributions are compared token by token, with standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 512  # tokens per forward


@dataclass(frozen=True)
class Quality:
    """Over `tokens` next-token distributions; KL(reference || model) in nats; `_se` = standard error."""

    tokens: int
    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_p99: float
    top1: float
    top1_se: float
    perplexity: float
    perplexity_reference: float


@torch.inference_mode()
def compare(model: Any, reference: Any, ids: Tensor, window: int = WINDOW) -> Quality:
    """Compare two causal language models on text.

    ids: int64 [1, T] or [T], cut into windows of `window` tokens that are run separately; T >= 2. Both
    models map ids [1, n] to `.logits` [1, n, V]; they may be compiled. Raises ValueError for too few tokens.
    """
    ids = ids.reshape(1, -1)
    pieces = [piece for piece in ids.split(window, dim=1) if piece.shape[1] >= 2]
    if not pieces:
        raise ValueError(f"compare: needs at least 2 tokens, got {ids.shape[1]}")
    columns = zip(*(_piece(model, reference, piece) for piece in pieces), strict=True)
    kl, same, loss, loss_reference = (torch.cat(column) for column in columns)
    n, m = len(kl), len(loss)
    agreement = float(same.mean())
    return Quality(
        tokens=n,
        kl_mean=float(kl.mean()),
        kl_mean_se=float(kl.std()) / math.sqrt(n),
        kl_median=float(kl.median()),
        kl_p99=float(kl.quantile(0.99)),
        top1=agreement,
        top1_se=math.sqrt(agreement * (1 - agreement) / n),
        perplexity=math.exp(float(loss.sum()) / m),
        perplexity_reference=math.exp(float(loss_reference.sum()) / m),
    )


def _piece(model: Any, reference: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token of ids [1, n]: KL and agreement [n], and the two losses [n - 1]. fp64 [n]."""
    ours, theirs = (m(ids).logits[0].double().log_softmax(-1) for m in (model, reference))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    following = ids[0, 1:, None]
    return kl, same, -ours[:-1].gather(1, following)[:, 0], -theirs[:-1].gather(1, following)[:, 0]
