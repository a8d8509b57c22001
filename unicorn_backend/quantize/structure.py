"""Is a module a language model? Decided by its structure, never by class names."""

from __future__ import annotations

from torch import nn

from unicorn_backend.quantize.recipe import Recipe

Shape = tuple[int, int]  # (in, out) of a linear


def is_language_model(model: nn.Module) -> tuple[bool, str]:
    """(True, why) or (False, why not): whether an untouched model gets the default recipe.

    Yes with a token table [V, H] and either a linear head H -> V, or gated feed-forwards together with
    attention. CNNs, plain MLPs, ViTs and BERT-style classifiers have neither.
    """
    default = Recipe.named("default")
    tables = {
        (m.num_embeddings, m.embedding_dim)
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding) and default.scheme_for(name, m) is not None
    }
    if not tables:
        return False, "no token embedding"
    # a segment table of 2 rows must not make a 2-class classifier its head: tokens have the largest table
    rows = max(count for count, _ in tables)
    tables = {table for table in tables if table[0] == rows}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        if (linear.out_features, linear.in_features) in tables:
            return True, f"{name or 'the model'} maps to the vocabulary of a token embedding"
    shapes = [_child_linears(module) for module in model.modules()]
    gated, attention = any(map(_is_gated_ffn, shapes)), any(map(_is_attention, shapes))
    if gated and attention:
        return True, "a token embedding, gated feed-forwards and attention"
    missing = [text for text, there in (("gated feed-forward", gated), ("attention", attention)) if not there]
    return False, f"a token embedding, but no linear to its vocabulary and no {' and no '.join(missing)}"


def _child_linears(module: nn.Module) -> list[Shape]:
    return [(m.in_features, m.out_features) for m in module.children() if isinstance(m, nn.Linear)]


def _is_gated_ffn(linears: list[Shape]) -> bool:
    """H -> F twice (gate, up) and F -> H, or H -> 2F and F -> H; nothing else from H."""
    for hidden, width in set(linears):
        into = [shape for shape in linears if shape[0] == hidden and shape != (width, hidden)]
        if (width, hidden) in linears and into == [(hidden, width)] * 2 and width != hidden:
            return True
        if width % 2 == 0 and into == [(hidden, width)] and (width // 2, hidden) in linears:
            return True
    return False


def _is_attention(linears: list[Shape]) -> bool:
    """H -> A, twice H -> B, and A -> H; or one fused H -> A + 2B with A -> H."""
    for width, hidden in linears:  # the output projection A -> H
        into = [shape[1] for shape in linears if shape[0] == hidden]
        rest = list(into)
        if width in rest:
            rest.remove(width)
        if any(rest.count(b) >= 2 and b <= width for b in rest) and width in into:
            return True
        if any(fused > width and (fused - width) % 2 == 0 and fused <= 3 * width for fused in into):
            return True
    return False
