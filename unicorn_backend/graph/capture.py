"""Dynamo's graph -> one normal form that the patterns are written against.

Pre-dispatch ATen keeps `linear`, `scaled_dot_product_attention`, `gelu` and the cache's in-place
updates as single nodes, and spells every view and cast the same way whatever the model's Python
looked like. (After AOTAutograd they are decomposed and functionalised, which costs copies of the
KV cache and makes matching harder.)
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx


def normalise(gm: GraphModule) -> GraphModule | str:
    """Pre-dispatch ATen form of Dynamo's `gm`, same inputs and outputs in the same order; or why there is none."""
    inputs = [_example(node) for node in gm.graph.nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
    if mode is None:
        return "no tensor inputs"
    with mode, torch.no_grad(), _no_tensor_meta():
        normal = make_fx(gm, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    # Inside a functorch transform (vmap, as transformers uses for image-token masks) values escape the tracer
    # and end up as constants without data.
    if any(isinstance(constant(normal, node), FakeTensor) for node in normal.graph.nodes if node.op == "get_attr"):
        return "a functorch transform (vmap) in the graph cannot be traced to ATen operators"
    return normal


_quiet = threading.local()
_plain_metadata = getattr(proxy_tensor, "_extract_tensor_metadata", None)


@contextlib.contextmanager
def _no_tensor_meta() -> Iterator[None]:
    """Leave `meta["tensor_meta"]` out: nobody reads it, and with symbolic sizes it is a quarter of make_fx's time."""
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = False


def _metadata(*args: Any, **kwargs: Any) -> Any:
    assert _plain_metadata is not None
    return None if getattr(_quiet, "on", False) else _plain_metadata(*args, **kwargs)


if _plain_metadata is not None:
    setattr(proxy_tensor, "_extract_tensor_metadata", _metadata)  # noqa: B010  (not exported by that module)


def constant(gm: GraphModule, node: torch.fx.Node) -> Any:
    """What a get_attr node names."""
    return operator.attrgetter(str(node.target))(gm)


def _example(node: torch.fx.Node) -> Any:
    value = node.meta.get("example_value")
    if value is None and "val" in node.meta:
        return node.meta["val"]
    return value
