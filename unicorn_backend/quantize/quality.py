"""What quantization changed: the distributions of two models over the same text, token by token.

Perplexity alone hides changes that cancel; the KL divergence from the reference does not. Standard errors
are taken over blocks of tokens, because neighbouring tokens are not independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicorn_backend.errors import OptionError

WINDOW = 256  # tokens per context
SAMPLES = 100  # of the standard error of a quantile
BLOCK = 32  # tokens per block of the standard errors, and per step in fp64 (a 262k vocabulary: 67 MB)


@dataclass(frozen=True)
class Quality:
    """`compare`'s result over `tokens` positions. KL in nats; shares and their errors in 0..1."""

    tokens: int
    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_median_se: float
    kl_99: float
    kl_99_se: float
    top1: float  # share of positions where both put the same token first
    top1_se: float
    perplexity: float
    perplexity_se: float
    perplexity_reference: float
    perplexity_reference_se: float

    def __str__(self) -> str:
        return (
            f"KL {self.kl_mean:.3g} ± {self.kl_mean_se:.1g} (median {self.kl_median:.3g}, 99 % {self.kl_99:.3g}), "
            f"same top-1 {self.top1:.1%} ± {self.top1_se:.1%}, "
            f"perplexity {self.perplexity:.2f} ± {self.perplexity_se:.2f} "
            f"(reference {self.perplexity_reference:.2f}), {self.tokens} tokens"
        )


@torch.inference_mode()
def compare(model: Any, reference: Any, ids: Tensor, *, window: int = WINDOW) -> Quality:
    """Compare `model` with `reference` on ids int64 [B, T], each row cut into windows of `window` tokens.

    Both are callables that give `.logits` [1, T, V] (compiled or not); KL is from the reference to the model.
    A rest shorter than `window` is dropped, unless it is all there is. Raises `OptionError` without a token
    to predict.
    """
    blocks = list(_positions(model, reference, ids, window))
    if not blocks:
        raise OptionError(f"compare: ids of shape {tuple(ids.shape)} hold no token to predict; give at least 2 tokens")
    kl, same, loss, loss_reference = torch.cat(blocks, dim=1)
    perplexity, perplexity_reference = float(loss.mean().exp()), float(loss_reference.mean().exp())
    return Quality(
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_mean_se=_standard_error(kl),
        kl_median=float(kl.quantile(0.5)),
        kl_median_se=_quantile_error(kl, 0.5),
        kl_99=float(kl.quantile(0.99)),
        kl_99_se=_quantile_error(kl, 0.99),
        top1=float(same.mean()),
        top1_se=_standard_error(same),
        perplexity=perplexity,
        perplexity_se=perplexity * _standard_error(loss),
        perplexity_reference=perplexity_reference,
        perplexity_reference_se=perplexity_reference * _standard_error(loss_reference),
    )


def _positions(model: Any, reference: Any, ids: Tensor, window: int) -> Iterator[Tensor]:
    """Per block: fp64 [4, tokens] of KL, same top-1 (0 or 1), loss, loss of the reference."""
    if window < 2:
        raise OptionError(f"compare: window must be at least 2 tokens, got {window}")
    for row in ids:
        whole = max(1, len(row) // window)
        for part in row[: whole * window].split(window):
            if len(part) < 2:
                continue
            p = reference(input_ids=part[None], use_cache=False).logits[0, :-1].clone()
            q = model(input_ids=part[None], use_cache=False).logits[0, :-1]
            for first in range(0, len(p), BLOCK):
                rows = slice(first, first + BLOCK)
                yield _block(p[rows], q[rows], part[1:][rows])


def _block(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, V] of the reference and the model -> fp64 [4, n]."""
    same = (p.argmax(-1) == q.argmax(-1)).double()
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    losses = [-log.gather(1, targets[:, None])[:, 0] for log in (log_q, log_p)]
    return torch.stack([kl, same, *losses])


def _quantile_error(values: Tensor, quantile: float) -> float:
    """Standard error of a quantile: its spread over samples of whole blocks, drawn with a fixed seed."""
    blocks = _blocks(values)
    if len(blocks) < 2:
        return float("nan")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(blocks), (SAMPLES, len(blocks)), generator=generator)
    return float(torch.stack([blocks[row].flatten().quantile(quantile) for row in drawn]).std())


def _standard_error(values: Tensor) -> float:
    """Of the mean, from the spread of block means."""
    means = _blocks(values).mean(1)
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")


def _blocks(values: Tensor) -> Tensor:
    """[blocks, BLOCK] of neighbouring tokens; [tokens, 1] where that would be fewer than 8 blocks."""
    return values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK) if len(values) >= 8 * BLOCK else values[:, None]
