"""Digests of Python objects that mean the same in another process: "is this still the function that was traced?"

A function is its bytecode, constants, defaults, closure and attributes; a class is everything in the
dictionaries of its bases. Where a value has no digest that would notice a change (an arbitrary object), its type
stands for it and `opaque` is set.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Iterable
from typing import Any

import torch

MAX_DEPTH = 40  # nested containers, closures and bases; deeper is opaque
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, so its attributes can be replaced

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented), slice, range)
_TORCH_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_BUILTIN_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_CODE = (
    "co_argcount co_posonlyargcount co_kwonlyargcount co_flags co_code co_names co_varnames co_freevars co_cellvars "
    "co_name"
).split()

# What a user asks of a tensor's sizes (mark_dynamic and the like); torch sets other such attributes as it traces.
_MARKS = frozenset(
    "_dynamo_dynamic_indices _dynamo_weak_dynamic_indices _dynamo_unbacked_indices _dynamo_strict_unbacked_indices "
    "_dynamo_static_indices _dynamo_dynamic_range _dynamo_hint_overrides _dynamo_shape_ids".split()
)

# What Python and its libraries write into classes and functions as they are used, or that cannot change a trace.
_IGNORED = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__slotnames__ __firstlineno__ __static_attributes__ _abc_impl __abstractmethods__ __parameters__ "
    "__orig_bases__ __subclasshook__ __signature__ __type_params__ _torchdynamo_wrapper_id".split()
)


class Describer:
    """Digests of values, each object once. `opaque` lists the types whose contents a digest does not cover."""

    def __init__(self) -> None:
        self.opaque: list[str] = []
        self._done: dict[int, str] = {}
        self._keep: list[Any] = []  # so that no id is reused

    def exact(self, value: Any) -> str | None:
        """The digest, or None where it would not notice every change."""
        before = len(self.opaque)
        digest = self.digest(value)
        return digest if len(self.opaque) == before else None

    def digest(self, value: Any, depth: int = 0) -> str:
        kind = type(value)
        if kind in _CONSTANTS:
            return f"{kind.__name__} {value!r}"
        if isinstance(value, _TORCH_CONSTANTS):
            return f"{kind.__name__} {value}"
        if depth > MAX_DEPTH:
            return self._opaque(value)
        if id(value) in self._done:
            return self._done[id(value)]
        self._keep.append(value)
        self._done[id(value)] = f"inside {kind.__name__} {getattr(value, '__qualname__', '')}"  # a cycle ends here
        parts = self._parts(value, depth + 1)
        self._done[id(value)] = result = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return result

    def _parts(self, value: Any, depth: int) -> list[str]:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(value, types.CodeType):
            fields = [repr(getattr(value, field)) for field in _CODE]
            return [name, *fields, *self._all(value.co_consts, depth)]
        if isinstance(value, types.FunctionType):
            return [name, *self._function(value, depth)]
        if isinstance(value, type):
            return ["class", *self._class(value, depth)]
        if isinstance(value, enum.Enum):
            return [name, value.name]
        if isinstance(value, types.ModuleType):
            return [name, value.__name__]
        if isinstance(value, _BUILTIN_FUNCTIONS):
            owner = getattr(value, "__self__", None)
            of = owner.__name__ if isinstance(owner, (type, types.ModuleType)) else type(owner).__name__
            return [name, of, str(getattr(value, "__module__", "")), getattr(value, "__qualname__", "")]
        if isinstance(value, types.MethodType):
            return [name, self.digest(value.__func__, depth), self.digest(type(value.__self__), depth)]
        if isinstance(value, property):
            return [name, *self._all((value.fget, value.fset, value.fdel), depth)]
        if isinstance(value, (staticmethod, classmethod)):
            return [name, self.digest(value.__func__, depth)]
        if isinstance(value, functools.cached_property):
            return [name, self.digest(value.func, depth)]
        if isinstance(value, (functools.partial, functools.partialmethod)):
            return [name, *self._all((value.func, value.args, value.keywords), depth)]
        if isinstance(value, functools._lru_cache_wrapper):
            return [name, self.digest(value.__wrapped__, depth)]
        if isinstance(value, types.CellType):
            return [name, *self._cell(value, depth)]
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return [name, str(value)]
        if isinstance(value, (tuple, list)):
            return [name, *self._all(value, depth)]
        if isinstance(value, (set, frozenset)):
            return [name, *sorted(self._all(value, depth))]
        if isinstance(value, (dict, types.MappingProxyType)):
            return [name, *self._dict(dict(value), depth)]
        return [name, self._opaque(value), *self._plain_attributes(value, depth)]

    def _all(self, values: Iterable[Any], depth: int) -> list[str]:
        return [self.digest(value, depth) for value in values]

    def _dict(self, values: dict[Any, Any], depth: int) -> list[str]:
        return [f"{self.digest(key, depth)}: {self.digest(value, depth)}" for key, value in values.items()]

    def _function(self, function: types.FunctionType, depth: int) -> list[str]:
        attributes = {key: value for key, value in vars(function).items() if key not in _IGNORED}
        parts = (function.__code__, function.__defaults__, function.__kwdefaults__, attributes)
        cells = [part for cell in function.__closure__ or () for part in self._cell(cell, depth)]
        return [function.__module__ or "", function.__qualname__, *self._all(parts, depth), *cells]

    def _cell(self, cell: types.CellType, depth: int) -> list[str]:
        try:
            return [self.digest(cell.cell_contents, depth)]
        except ValueError:
            return ["empty"]

    def _class(self, cls: type, depth: int) -> list[str]:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if not cls.__flags__ & _HEAP_TYPE or cls.__module__.startswith(("torch._C", "typing")):
            return [name]
        own = {key: value for key, value in vars(cls).items() if key not in _IGNORED}
        bases = [self.digest(base, depth) for base in cls.__bases__]
        return [name, self.digest(type(cls), depth), *bases, *self._dict(own, depth)]

    def _plain_attributes(self, value: Any, depth: int) -> list[str]:
        """Constants and functions among the attributes of an object: more than its type, though not everything."""
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(value, (torch.Tensor, torch.nn.Module)):
            return []
        wanted = (*_CONSTANTS, types.FunctionType, types.MethodType, tuple, list, dict, set, *_TORCH_CONSTANTS)
        return self._dict({key: v for key, v in attributes.items() if isinstance(v, wanted)}, depth)

    def _opaque(self, value: Any) -> str:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        self.opaque.append(name)
        return f"some {name}"


def tensor_facts(value: torch.Tensor) -> tuple[Any, ...]:
    """What guards and traces may depend on, apart from sizes, strides and values."""
    marks = [f"{name} {mark}" for name, mark in sorted(vars(value).items()) if name in _MARKS]
    return (
        f"{type(value).__module__}.{type(value).__qualname__}",
        str(value.dtype),
        str(value.device),
        str(value.layout),
        value.requires_grad,
        value.ndim,
        torch._C._dispatch_keys(value).raw_repr(),
        tuple(marks),
    )
