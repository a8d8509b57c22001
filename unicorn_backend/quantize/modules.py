"""Modules with packed weights: `QuantLinear` and `QuantEmbedding`.

A float module becomes one of them *in place* (its class changes, not the object), so hooks, buffers,
subclass behaviour and references held elsewhere stay. The packed tensors are buffers, not parameters:
transformers takes `model.dtype` from the first floating parameter, and a scale must not be that.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from unicorn_backend import ops as _ops  # noqa: F401  (defines the unicorn:: ops)
from unicorn_backend.layouts import BUFFERS, buffers_of, scheme_of
from unicorn_backend.quantize.schemes import ensure_kernels


class PackedWeight:
    """What `module.weight` gives: shape, dtype and device of the weight, and its rows on demand.

    Not a tensor: code that would compute with the float weight fails here instead of computing nonsense.
    """

    _is_hf_initialized = True  # transformers initialises what lacks this mark
    requires_grad = False

    def __init__(self, module: _Packed) -> None:
        self._module = module

    @property
    def dtype(self) -> torch.dtype:
        return self._module.weight_dtype

    @property
    def device(self) -> torch.device:
        return self._module.weight_packed.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._module.weight_shape)

    @property
    def ndim(self) -> int:
        return 2

    def dim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Tensor:
        """Rows, as `weight[i]`, `weight[ids]` or `weight[ids, :]`: dequantized, in the weight's dtype."""
        rows, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(rows, (int, Tensor)) or any(part != slice(None) for part in rest):
            raise TypeError(f"a quantized weight gives whole rows only, by number: got index {index!r}")
        ids = torch.as_tensor(rows, device=self.device) % self.shape[0]
        out: Tensor = torch.ops.unicorn.embedding(ids, self._module.packed, *self.shape, self.dtype)
        return out

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the weight of a quantized module has no {name!r}: its float values are gone "
            "(quantize with keep_weights=True and restore() brings them back, or load the float checkpoint)"
        )

    def __repr__(self) -> str:
        return f"PackedWeight({list(self.shape)}, {self._module.scheme}, {self.dtype})"


class _Packed(nn.Module):
    """What both modules share. `weight_dtype`: dtype of the float weight; `weight_shape`: (N, K)."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_dtype: torch.dtype
    weight_shape: tuple[int, int]

    @property
    def weight(self) -> Any:
        """A `PackedWeight`."""
        return PackedWeight(self)

    @property
    def packed(self) -> list[Tensor]:
        """The tensor list of the op contract."""
        return [tensor for name in BUFFERS if (tensor := self._buffers.get(name)) is not None]

    @property
    def scheme(self) -> str:
        return scheme_of(self.packed)

    @property
    def float_weight(self) -> nn.Parameter | None:
        """The original weight, if it was kept."""
        kept = self.__dict__.get("_kept_weight")
        return kept[0] if kept else None

    def set_packed(self, packed: list[Tensor], *, persistent: bool = True) -> None:
        """Use these tensors; `persistent=False` where another module saves them (a tied head)."""
        for name, tensor in zip(buffers_of(scheme_of(packed)), packed, strict=True):
            self.register_buffer(name, tensor, persistent=persistent)

    def extra_repr(self) -> str:
        n, k = self.weight_shape
        bias = ", bias" if getattr(self, "bias", None) is not None else ""
        return f"{k} -> {n}, {self.scheme}{bias}" if isinstance(self, nn.Linear) else f"{n}, {k}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Devices change, dtypes of packed tensors do not: `.to(dtype)` is about the activations."""
        packed = {name: self._buffers.pop(name) for name in BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in packed.items():
            assert tensor is not None
            moved = fn(tensor.view(torch.uint8)).view(tensor.dtype)
            # The same object where nothing moved: a tied head keeps sharing.
            same = moved.device == tensor.device and moved.data_ptr() == tensor.data_ptr()
            self._buffers[name] = tensor if same else moved
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_packed.device)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time cannot be pickled by name: rebuild them from the float class."""
        return _rebuild, (_float_class(type(self)),), self.__dict__


class QuantLinear(_Packed, nn.Linear):  # type: ignore[override]
    """`y[..., N] = x[..., K] . W[N, K]^T + bias` with a packed W, through `unicorn::linear`."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = torch.ops.unicorn.linear(input, self.packed, self.bias, self.out_features)
        return y


class QuantEmbedding(_Packed, nn.Embedding):  # type: ignore[override]
    """Rows of a packed table [V, H] in the dtype of the float table, through `unicorn::embedding`."""

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = torch.ops.unicorn.embedding(
            input, self.packed, self.num_embeddings, self.embedding_dim, self.weight_dtype
        )
        return rows


def refusal(module: nn.Module) -> str | None:
    """Why the weight of this Linear or Embedding cannot be packed, or None if it can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (parametrized, or shared some other way)"
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weight is {weight.dtype} {list(weight.shape)}; bf16, fp16 or fp32 matrices are quantized"
    if weight.numel() == 0:
        return "its weight is empty"
    if "forward" in module.__dict__ and not wrapped(module):
        return "its forward is replaced on the instance (a hook of another library)"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner reads the float weight directly"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes the table in forward"
    return _overridden(type(module), nn.Linear if isinstance(module, nn.Linear) else nn.Embedding)


def wrapped(module: nn.Module) -> bool:
    """True where transformers replaced the forward because the module is sharded over processes."""
    return getattr(module.__dict__.get("forward"), "__name__", "") == "tp_forward"


# What a `PackedWeight` answers without the float values.
_ANSWERED = {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "is_floating_point"}


@functools.cache
def weights_read(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose `weight` the forward of `cls` computes with itself, as `self.proj.weight @ x`."""
    found, seen, queue = set(), set(), ["forward"]
    while queue:
        name = queue.pop()
        method = inspect.unwrap(getattr(cls, name, None))  # type: ignore[arg-type]
        code = getattr(method, "__code__", None)
        if code is None or name in seen or "cuda" in name:  # the path of another device
            continue
        seen.add(name)
        for part in _nested(code):
            queue += [used for used in part.co_names if inspect.isfunction(getattr(cls, used, None))]
            steps = [*dis.get_instructions(part)]
            for child, weight, after in zip(steps, steps[1:], steps[2:], strict=False):
                attributes = all(step.opname in ("LOAD_ATTR", "LOAD_METHOD") for step in (child, weight))
                if attributes and weight.argval == "weight" and after.argval not in _ANSWERED:
                    found.add(str(child.argval))
    return frozenset(found)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _overridden(cls: type[nn.Module], base: type[nn.Module]) -> str | None:
    """A Linear subclass must not override forward; an Embedding subclass must call the base's."""
    for step in cls.__mro__[: cls.__mro__.index(base)]:
        forward = vars(step).get("forward")
        if forward is None:
            continue
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if base is nn.Linear or code is None or "super" not in code.co_names:
            return f"its class {step.__name__} has its own forward"
    return None


def pack_module(module: nn.Module, packed: list[Tensor], *, keep: bool = False, owner: bool = True) -> None:
    """Turn a Linear or Embedding into its quantized form, in place. The float weight is let go, unless `keep`.

    owner: False for the second user of shared tensors: they are saved with the first.
    """
    ensure_kernels()
    weight = module._parameters.pop("weight")
    assert weight is not None
    module.__class__ = quantized_class(type(module))  # type: ignore[arg-type]
    assert isinstance(module, _Packed)
    module.weight_dtype, module.weight_shape = weight.dtype, (weight.shape[0], weight.shape[1])
    module.set_packed(packed, persistent=owner)
    if keep:
        module.__dict__["_kept_weight"] = (weight,)  # in a tuple: not a parameter of the module any more


def unpack_module(module: QuantLinear | QuantEmbedding, weight: nn.Parameter) -> None:
    """Inverse of `pack_module`: the float class and this weight."""
    for name in BUFFERS:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    for name in ("_kept_weight", "weight_dtype", "weight_shape"):
        module.__dict__.pop(name, None)
    bias = module._parameters.pop("bias", None)
    module.__class__ = _float_class(type(module))  # type: ignore[assignment]
    module.register_parameter("weight", weight)
    if isinstance(module, nn.Linear):
        module.register_parameter("bias", bias)  # after the weight, as in a fresh module


@functools.cache
def quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with its nn.Linear / nn.Embedding replaced by the quantized one, just below it in the MRO."""
    if cls is nn.Linear:
        return QuantLinear
    if cls is nn.Embedding:
        return QuantEmbedding
    base = QuantLinear if issubclass(cls, nn.Linear) else QuantEmbedding
    return type(f"Quant{cls.__name__}", (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _float_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls is QuantLinear:
        return nn.Linear
    if cls is QuantEmbedding:
        return nn.Embedding
    base: type[nn.Module] = cls.__mro__[1]
    return base


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    ensure_kernels()
    new = quantized_class(cls)  # type: ignore[arg-type]
    return new.__new__(new)
