"""Compiled graphs on disk, so that a second process does not trace again.

Dynamo's tracing is nearly all of the compile time (8 s per graph of a 26-layer model). What it gives is small:
guards, new bytecode, and our finished graph. All three are stored after a compile of a frame whose backend is
ours, and put back when the same frame comes in another process. torch's own `caching_precompile` does not serve:
its key is a name and a line number, and it drops the guards that compare identities.

A stored graph is used only if everything the trace depended on is the same:

1. the key: versions, the source of this package, options, Dynamo's settings, grad mode and the like, and the
   structure of the model (`_structure`: every module's class with all its methods, hooks, attributes, config);
2. every function that Dynamo inlined, and every global those functions name (`_traced`);
3. every guard: its source is evaluated in the live frame and the value compared with what it was (`_expected`);
   then all guards are built anew from the live values, as a trace would have done, and checked.

Whatever cannot be compared is not stored, with a logged reason. Guards are rebuilt from live values, so none is
dropped, and a loaded graph is left for a recompile in exactly the cases in which a traced one would be.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import hashlib
import importlib
import inspect
import itertools
import logging
import os
import pickle
import platform
import re
import stat
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import bytecode_transformation, convert_frame, guards
from torch._dynamo.cache_size import exceeds_recompile_limit
from torch._guards import Source
from torch.fx import GraphModule

from unicorn_backend.integration import graph_file, prepare
from unicorn_backend.integration.fingerprint import _CONSTANTS, Describer, tensor_facts
from unicorn_backend.integration.graph_file import NotPortable
from unicorn_backend.integration.guards_once import OnceManager
from unicorn_backend.options import Options, cache_folder
from unicorn_backend.plan import Plan

log = logging.getLogger(__name__)

FORMAT = 2
MAGIC = b"unicorn compile cache\n"
TORCH = ("2.13",)  # versions whose internals this file was written against
MAX_FILES = 128
MAX_BYTES = 256 << 20
MAX_CANDIDATES = 16  # graphs of one model and one set of options

# What may go wrong while old data meets a new process: an answer of "not usable", never a failed compile.
_MISFIT = (
    NotPortable,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.PickleError,
)

Finish = Callable[[GraphModule, Plan, Options], Callable[..., Any]]

_state = threading.local()


@dataclass
class _Recording:
    """What a compile leaves for `_store`."""

    code: types.CodeType
    graphs: list[tuple[GraphModule, Plan]] = field(default_factory=list)
    entry: dict[str, Any] | str = "no guards were built"


@dataclass(frozen=True)
class _Frame:
    """One call of `convert_frame._compile`."""

    code: types.CodeType
    globals: dict[str, Any]
    locals: dict[str, Any]
    cache_entries: Any
    compile_id: Any
    key: str
    options: Options


class Statistics:
    """Counts in this process, for tests and the log."""

    loaded = 0
    stored = 0
    reasons: list[str] = []  # noqa: RUF012  (one process-wide list: the last reasons why nothing was loaded or stored)


def install(options_of: Callable[[Any], Options | None], finish: Finish) -> None:
    """Wrap Dynamo's compile of one frame, once. `options_of`: a compiler function's options if it is ours."""
    if not torch.__version__.startswith(TORCH):
        log.info("compile cache: off, written for torch %s, this is %s", ", ".join(TORCH), torch.__version__)
        return
    plain = convert_frame._compile
    if getattr(plain, "_unicorn", False):
        return
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def _compile(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        options = options_of(call["compiler_fn"])
        if options is None:
            return plain(*args, **kwargs)
        with _no_collection():
            return _cached(call, options, finish, lambda: plain(*args, **kwargs))

    _compile._unicorn = True  # type: ignore[attr-defined]
    convert_frame._compile = _compile
    setattr(convert_frame, "CheckFunctionManager", _RecordingManager)  # noqa: B010  (not exported by that module)


def _cached(call: dict[str, Any], options: Options, finish: Finish, compile_frame: Callable[[], Any]) -> Any:
    """The stored compile of this frame, or a new one, stored."""
    folder = open_folder() if options.cache else None
    if folder is None:
        return compile_frame()
    frame = _frame(call, options)
    if isinstance(frame, str):
        _note(f"not cached: {frame}")
        return compile_frame()
    loaded = _load(folder, frame, finish)
    if loaded is not None:
        return loaded
    with _record(frame.code) as recording:
        result = compile_frame()
    _store(folder, frame, recording, result)
    recording.graphs.clear()  # the guards' manager holds the recording, as long as torch holds the guards
    return result


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A trace makes millions of objects that live until its end; looking for garbage among them is 6 % of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def graph_made(gm: GraphModule, plan: Plan) -> None:
    """Called by the backend with each finished graph."""
    recording: _Recording | None = getattr(_state, "recording", None)
    if recording is not None:
        recording.graphs.append((gm, plan))


class _RecordingManager(OnceManager):
    """Dynamo's guard manager; where a compile is being recorded it hands over its guards."""

    def __init__(self, f_code: types.CodeType, *args: Any, **kwargs: Any) -> None:
        recording: _Recording | None = getattr(_state, "recording", None)
        self._recording = recording if recording is not None and recording.code is f_code else None
        if self._recording is not None:
            kwargs["save_guards"] = True  # it calls `serialize_guards` then
        super().__init__(f_code, *args, **kwargs)

    def serialize_guards(self, builder: Any, sorted_guards: list[Any], output_graph: Any) -> bytes:
        if self._recording is None:
            plain: bytes = super().serialize_guards(builder, sorted_guards, output_graph)
            return plain
        try:
            entry = _entry(sorted_guards, output_graph, self.shape_code_parts)
            self._recording.entry = entry | {"model_untouched": self.model_untouched}
        except _MISFIT as error:
            self._recording.entry = f"{type(error).__name__}: {error}"
        return b""


@contextlib.contextmanager
def _record(code: types.CodeType) -> Iterator[_Recording]:
    before = getattr(_state, "recording", None)
    _state.recording = recording = _Recording(code)
    try:
        yield recording
    finally:
        _state.recording = before


# ---- the key --------------------------------------------------------------------------------------------------


def _frame(call: dict[str, Any], options: Options) -> _Frame | str:
    """The frame with its key, or why it is not cached."""
    hooks, roots = call["hooks"], prepare._current_roots()
    if not roots:
        return "the compiled function is not a module or a method of one"
    if call["export"] or call.get("package") is not None:
        return "torch.export or torch's own precompile is at work"
    if hooks.guard_filter_fn or hooks.guard_export_fn:
        return "guards are filtered"
    if _modes_active():
        return "a torch function, dispatch or functorch mode is active"
    if convert_frame._bytecode_hooks:
        return "a hook on Dynamo's bytecode is registered"
    if exceeds_recompile_limit(call["cache_size"], call["compile_id"])[0]:
        return "the recompile limit is reached"
    try:
        describer = Describer()
        structures = [_structure(root, describer) for root in roots]
        parts = [
            repr((FORMAT, sys.version, platform.machine(), torch.__version__, torch.version.git_version)),
            repr((_version("transformers"), _package_digest())),
            repr((options, call["one_graph"], _state_facts())),
            describer.digest([_settings(), torch.Tensor, nn.Parameter]),
            describer.digest(call["code"]),
            *structures,
        ]
    except _MISFIT as error:
        return str(error)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return _Frame(
        call["code"], call["globals"], call["locals"], call["cache_entries"], call["compile_id"], key, options
    )


def _modes_active() -> bool:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return bool(
        _get_current_function_mode_stack()
        or _get_current_dispatch_mode_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._functorch._aot_autograd.utils.top_saved_tensors_hooks() is not None
        or torch.utils._device.CURRENT_DEVICE is not None
    )


def _state_facts() -> tuple[Any, ...]:
    """Global state that a trace depends on; guards check it too."""
    return (
        _without_threads(convert_frame.initial_global_state or torch._C._dynamo.guards.GlobalStateGuard()),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        str(torch.get_default_dtype()),
        torch.autograd.forward_ad._current_level,
    )


def _without_threads(state: Any) -> str:
    """A trace does not depend on the number of threads, though Dynamo guards on it."""
    import json

    facts = json.loads(state.__getstate__())
    facts.pop("num_threads", None)
    return json.dumps(facts, sort_keys=True)


def _settings() -> dict[str, Any]:
    """Settings of Dynamo and of symbolic shapes, as they are inside this compiled call."""
    from torch._dynamo import config
    from torch.fx.experimental import _config as shape_config

    ignored = ("debug_dir_root", "base_dir")
    both = {"dynamo": config.get_config_copy(), "shapes": shape_config.get_config_copy()}
    return {name: {k: v for k, v in values.items() if k not in ignored} for name, values in both.items()}


def _version(name: str) -> str:
    return str(getattr(sys.modules.get(name), "__version__", "not imported"))


@functools.cache
def _package_digest() -> str:
    """Of every Python file of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") and "state_dict" not in name)

# Set by torch, transformers or this package on instances, and not read by a forward; what is read is guarded as well.
_NOT_STRUCTURE = frozenset(
    ("_compiled_call_impl", "generation_config", "hf_quantizer", "warnings_issued", "name_or_path", "_kept_weight")
)


def _structure(root: nn.Module, describer: Describer) -> str:
    """Digest of a module tree: classes, attributes, tensors' shapes. Raises NotPortable for hooks and overrides."""
    shared = nn.modules.module
    if any(getattr(shared, name) for name in vars(shared) if name.startswith("_global") and name.endswith("hooks")):
        raise NotPortable("global module hooks are registered")
    lines: list[str] = []
    first: dict[int, int] = {}  # what is shared: the number of an object at its first place
    for path, module in root.named_modules(remove_duplicate=False):
        shared_as = [first.setdefault(id(o), len(first)) for o in (module, *_own_tensors(module).values())]
        facts = (describer.digest(type(module)), _tensors(module), _attributes(path, module, describer))
        lines.append(f"{path} {shared_as} {facts}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _own_tensors(module: nn.Module) -> dict[str, Any]:
    return {**module._parameters, **module._buffers}


def _tensors(module: nn.Module) -> list[Any]:
    return [
        (name, t if t is None else (*tensor_facts(t), tuple(t.shape), t.stride()))
        for name, t in _own_tensors(module).items()
    ]


def _attributes(path: str, module: nn.Module, describer: Describer) -> str:
    if hooked := [name for name in _HOOKS if module.__dict__.get(name)]:
        raise NotPortable(f"{path or 'the model'} has {hooked[0]}")
    own = {}
    for name, value in module.__dict__.items():
        if name in _NOT_STRUCTURE or name in ("_parameters", "_buffers", "_modules") or name in _HOOKS:
            continue
        if callable(getattr(type(module), name, None)):
            raise NotPortable(f"{path or 'the model'}.{name} is replaced on the instance")
        own[name] = _attribute(value, describer)
    return describer.digest(own)


def _attribute(value: Any, describer: Describer) -> Any:
    """A config by its contents (without where it was read from), anything else by its digest."""
    contents = getattr(value, "__dict__", None)
    if type(value).__name__.endswith("Config") and isinstance(contents, dict):
        kept = {k: _attribute(v, describer) for k, v in contents.items() if k not in ("_name_or_path", "_commit_hash")}
        return [describer.digest(type(value)), kept]
    return describer.digest(value)


# ---- what a trace depended on ---------------------------------------------------------------------------------


def _traced(codes: set[types.CodeType]) -> dict[tuple[str, str], str]:
    """(module, name) -> digest: every inlined function, and every global that one of them names.

    Raises NotPortable for a function that its name does not lead to (made by exec, or swapped in by hand and gone
    by its own name); functions of torch and of Python are covered by their versions where that is so.
    """
    modules = [module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]
    by_file = {getattr(module, "__file__", None): module for module in modules}
    names: set[tuple[str, str]] = set()
    for code in codes:
        module = by_file.get(code.co_filename)
        if module is None or not _leads_to(module, code):
            if _is_fixed(code):
                continue
            raise NotPortable(f"the traced function {_qualname(code)} is not found in a module by its name")
        names.add((module.__name__, _qualname(code).split(".<locals>")[0]))
        names |= {(module.__name__, used) for used in _used_globals(module, code)}
    return _resolve(names)


def _resolve(names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    describer = Describer()
    return {name: describer.digest(_by_name(importlib.import_module(name[0]), name[1])) for name in sorted(names)}


def _by_name(module: types.ModuleType, qualname: str) -> Any:
    """Without calling descriptors: a property stays a property."""
    value: Any = module
    for part in qualname.split("."):
        lazy = isinstance(value, torch._ops._OpNamespace)  # an operator appears there when it is asked for
        value = getattr(value, part) if lazy else inspect.getattr_static(value, part)
    return value


def _qualname(code: types.CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))


def _is_fixed(code: types.CodeType) -> bool:
    """True for code that changes only with the version of Python or torch, and what dataclasses generate."""
    name = code.co_filename
    if name.startswith("<"):
        return name.startswith("<frozen ") or _qualname(code).startswith("__create_fn__")
    if name.startswith(f"{Path(torch.__file__).parent}{os.sep}"):
        return True
    return name.startswith(f"{Path(os.__file__).parent}{os.sep}") and "site-packages" not in name


def _leads_to(module: types.ModuleType, code: types.CodeType) -> bool:
    """True if `code` is in what its qualified name gives: the function, its wrappers, or nested in them."""
    try:
        start = _by_name(module, _qualname(code).split(".<locals>")[0])
    except AttributeError:
        return False
    queue, seen = [start], set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value is code:
            return True
        queue += _inside(value)
    return False


def _inside(value: Any) -> list[Any]:
    if isinstance(value, types.CodeType):
        return [const for const in value.co_consts if isinstance(const, types.CodeType)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        wrapped = [value.__wrapped__] if hasattr(value, "__wrapped__") else []
        return [value.__code__, *wrapped, *(c for c in cells if isinstance(c, (types.FunctionType, types.MethodType)))]
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset) if part is not None]
    inner = [getattr(value, name, None) for name in ("__func__", "__wrapped__", "func")]
    return [part for part in inner if part is not None]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _used_globals(module: types.ModuleType, code: types.CodeType) -> set[str]:
    """Names in the module that `code` mentions, and of those that are modules, what it mentions of them."""
    mentioned = _names(code)
    used: set[str] = set()
    queue, seen = [(module, "")], {id(module)}
    while queue:
        inside, prefix = queue.pop()
        for name in mentioned & vars(inside).keys():
            value = vars(inside)[name]
            used.add(prefix + name)
            if isinstance(value, types.ModuleType) and id(value) not in seen:
                seen.add(id(value))
                queue.append((value, f"{prefix}{name}."))
    return used


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


# ---- guards ---------------------------------------------------------------------------------------------------

_IDENTITY = frozenset(("ID_MATCH", "BUILTIN_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "CLOSURE_MATCH"))
_EQUALITY = frozenset(("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "CONSTANT_SUBCLASS_MATCH"))
_GLOBAL = frozenset(
    "GRAD_MODE DETERMINISTIC_ALGORITHMS GLOBAL_STATE TORCH_FUNCTION_STATE DEFAULT_DEVICE FSDP_TRAINING_STATE "
    "AUTOGRAD_SAVED_TENSORS_HOOKS DUAL_LEVEL FUNCTORCH_STACK_MATCH SHAPE_ENV".split()
)
# identity of these is found again by their name or contents; of any other object it is not
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType, enum.Enum)


def _expected(kind: str, extra: dict[str, Any], value: Any, other: Any, sizes: Any, describer: Describer) -> Any:
    """What a guard of this kind makes of `value`, comparable between processes. Raises NotPortable."""
    if kind == "TYPE_MATCH":
        return describer.digest(type(value))
    if kind in _IDENTITY:
        if type(value) not in _CONSTANTS and not isinstance(value, _NAMED) and not _is_op(value):
            raise NotPortable(f"a {kind} guard on an object of type {type(value).__name__}")
        return describer.digest(value)
    if kind in _EQUALITY:
        exact = describer.exact(value)
        if exact is None:
            raise NotPortable(f"a {kind} guard on {describer.opaque[-1]}")
        return exact
    if kind == "TENSOR_MATCH":
        return _tensor_expected(value, sizes)
    if kind == "HASATTR":
        return hasattr(value, extra["attr"])
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return _must(extra["attr"] not in value.__dict__, kind)
    if kind in ("DICT_CONTAINS", "DICT_NOT_CONTAINS"):
        return _must(dict.__contains__(value, extra["key"]) == (kind == "DICT_CONTAINS"), kind)
    if kind in ("SET_CONTAINS", "SET_NOT_CONTAINS"):
        return _must((extra["key"] in value) == (kind == "SET_CONTAINS"), kind)
    if kind == "EMPTY_NN_MODULE_HOOKS_DICT":
        return _must(len(value) == 0, kind)
    if kind == "SEQUENCE_LENGTH":
        return (describer.digest(type(value)), len(value))
    if kind in ("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"):
        keys = list(dict.keys(value) if isinstance(value, dict) else value.keys())
        exact = describer.exact(keys)
        if exact is None:
            raise NotPortable(f"a {kind} guard on keys of type {describer.opaque[-1]}")
        return (describer.digest(type(value)), exact)
    if kind == "DUPLICATE_INPUT":
        return _must(value is other, kind)
    raise NotPortable(f"guards of kind {kind} are not known to the cache")


def _is_op(value: Any) -> bool:
    return isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, types.MethodDescriptorType))


def _must(holds: bool, kind: str) -> bool:
    if not holds:
        raise NotPortable(f"a {kind} guard does not hold")
    return True


def _tensor_expected(value: Any, sizes: Any) -> Any:
    """Sizes and strides are compared where the guard fixes them."""
    if not isinstance(value, torch.Tensor):
        return f"no tensor but {type(value).__name__}"
    if sizes is None or value.layout is not torch.strided:
        raise NotPortable("a tensor guard without sizes")
    size, stride = sizes
    if len(size) != value.ndim:
        return f"{value.ndim} dimensions"
    fixed_size = [got if want is not None else None for got, want in zip(value.shape, size, strict=True)]
    fixed_stride = [got if want is not None else None for got, want in zip(value.stride(), stride, strict=True)]
    return (*tensor_facts(value), fixed_size, fixed_stride)


def _entry(sorted_guards: Sequence[Any], output: Any, shape_parts: Any) -> dict[str, Any]:
    """What is stored of a trace, apart from code and graph. Raises NotPortable."""
    if output.aotautograd_guards or output.functorch_layers or output.torch_function_mode_stack:
        raise NotPortable("guards of AOTAutograd, functorch or torch function modes")
    if output.torch_function_subclass_inlined or output.current_device is not None or output.export:
        raise NotPortable("a tensor subclass or a default device was traced")
    if shape_parts is None or shape_parts.cpp_code_parts is not None:
        raise NotPortable("shape guards are compiled code")
    sizes = {source: _concrete(sizes) for source, sizes in output.input_source_to_sizes_strides.items()}
    described = [_describe_guard(guard) for guard in sorted_guards]
    described.sort(key=lambda guard: guard[0].name.startswith("L['self']"))  # what tells prefill from decode first
    values = _Values(output.local_scope, output.global_scope)
    describer = Describer()
    return {
        "guards": [(*guard, values.expected(guard, sizes, describer)) for guard in described],
        "sizes": sizes,
        "shapes": shape_parts,
        "key_order": list(output.guard_on_key_order),
        "dual_level": output.dual_level,
        "builtins": output.name_of_builtins_dict_key_in_fglobals,
        "globals": _globals(output),
        "traced": _traced(set(output.traced_code)),
    }


def _describe_guard(guard: Any) -> tuple[Source, str, dict[str, Any]]:
    create, extra = guard.create_fn, {}
    if isinstance(create, functools.partial):
        if create.args:
            raise NotPortable(f"a {guard.create_fn_name()} guard with positional arguments")
        extra = {name: value for name, value in create.keywords.items() if name not in ("value", "recompile_hint")}
    if any(not isinstance(value, (str, int, bool, type(None), Source)) for value in extra.values()):
        raise NotPortable(f"a {guard.create_fn_name()} guard with an object")
    return guard.originating_source, guard.create_fn_name(), extra


def _concrete(sizes: Any) -> tuple[list[int | None], list[int | None]]:
    return guards.convert_to_concrete_values(sizes["size"]), guards.convert_to_concrete_values(sizes["stride"])


class _Values:
    """Values of guard sources in a frame."""

    def __init__(self, local_scope: dict[str, Any], global_scope: dict[str, Any]) -> None:
        self.scope = {"L": local_scope, "G": global_scope}
        self.names = guards._get_closure_vars()
        self._cache: dict[Any, Any] = {}

    def get(self, source: Source) -> Any:
        return source.get_value(self.scope, self.names, self._cache)

    def expected(self, guard: tuple[Source, str, dict[str, Any]], sizes: dict[Any, Any], describer: Describer) -> Any:
        source, kind, extra = guard
        if kind in _GLOBAL:
            return None
        other = self.get(extra["source_b"]) if "source_b" in extra else None
        return _expected(kind, extra, self.get(source), other, sizes.get(source), describer)

    def shapes_hold(self, expressions: Sequence[str]) -> bool:
        return all(eval(text, {**self.names, **self.scope}) for text in expressions)


def _globals(output: Any) -> dict[str, tuple[str, ...]]:
    """Name -> what Dynamo put into the frame's globals under it, for its bytecode and guards."""
    found: dict[str, tuple[str, ...]] = {name: ("module", module) for name, module in output.import_sources.items()}
    for hook in output.cleanups:
        value = hook.scope[hook.name]
        if hook.name == output.name_of_builtins_dict_key_in_fglobals:
            found[hook.name] = ("builtins",)
        elif isinstance(value, types.ModuleType):
            found[hook.name] = ("module", value.__name__)
        elif hook.name.startswith("__compiled_fn"):
            found[hook.name] = ("graph",)
        else:
            found[hook.name] = graph_file.dump_target(value)
    if sum(what == ("graph",) for what in found.values()) != 1:
        raise NotPortable("the frame has a graph break, or no graph")
    return found


# ---- store and load -------------------------------------------------------------------------------------------


def _store(folder: Path, frame: _Frame, recording: _Recording, result: Any) -> None:
    entry, guarded = recording.entry, result.guarded_code
    if isinstance(entry, str) or guarded is None or len(recording.graphs) != 1:
        _note(f"not stored: {entry if isinstance(entry, str) else f'{len(recording.graphs)} graphs'}")
        return
    gm, plan = recording.graphs[0]
    try:
        data = pickle.dumps({**entry, "code": _dump_code(guarded.code), "graph": graph_file.dump(gm), "plan": plan})
        _write(folder, frame.key, data)
    except _MISFIT as error:
        _note(f"not stored: {type(error).__name__}: {error}")
        return
    Statistics.stored += 1
    log.info("compile cache: stored graph %d (%.1f MB)", plan.graph, len(data) / 1e6)


def _load(folder: Path, frame: _Frame, finish: Finish) -> Any:
    """The first stored compile of this frame that fits, installed; or None."""
    for path in _candidates(folder, frame.key):
        start = time.perf_counter()
        data = _read(path)
        if data is None:
            continue
        try:
            found = _revive(pickle.loads(data), frame, finish)
        except _MISFIT as error:
            found = f"{type(error).__name__}: {error}"
        if not isinstance(found, str):
            with contextlib.suppress(OSError):
                os.utime(path)
            Statistics.loaded += 1
            log.info("compile cache: loaded a graph in %.2f s from %s", time.perf_counter() - start, path)
            return found
        _note(f"not loaded: {found}")
    return None


def _revive(entry: dict[str, Any], frame: _Frame, finish: Finish) -> Any:
    """What `_compile` would have returned, or the first thing that is not as it was."""
    if any(what == ("graph",) and name in frame.globals for name, what in entry["globals"].items()):
        return "it is in this process already, and its guards did not hold"
    now = _resolve(set(entry["traced"]))
    if changed := [name for name, want in entry["traced"].items() if now[name] != want]:
        return f"{'.'.join(changed[0])} is another function or value"
    placed = _place_globals(entry["globals"], frame.globals)
    kept = False
    try:
        values = _Values(frame.locals, frame.globals)
        describer = Describer()
        for source, kind, extra, want in entry["guards"]:
            if values.expected((source, kind, extra), entry["sizes"], describer) != want:
                return f"{kind} {source.name} is not as it was"
        if not values.shapes_hold(entry["shapes"].python_code_parts.exprs):
            return "other shapes"
        manager = _build_guards(entry, frame)
        if not manager.check(frame.locals):
            return f"the rebuilt guards do not hold: {_failed_guard(manager, frame)}"
        guarded = _guarded_code(entry, frame, manager, finish)
        kept = True
        return guarded
    finally:
        if not kept:
            for name in placed:
                frame.globals.pop(name, None)


def _place_globals(wanted: dict[str, tuple[str, ...]], scope: dict[str, Any]) -> list[str]:
    """Put them into `scope`; returns those that are to go with the code. Raises NotPortable, changing nothing."""
    values = {}
    for name, what in wanted.items():
        if what == ("graph",):
            value = None
        elif what == ("builtins",):
            builtin = scope["__builtins__"]
            value = builtin if isinstance(builtin, dict) else builtin.__dict__
        elif what[0] == "module":
            value = importlib.import_module(what[1])
        else:
            value = graph_file.load_target(what)
        if name in scope and (what == ("graph",) or scope[name] is not value):
            raise NotPortable(f"the global {name} is taken")
        values[name] = value
    new = [name for name in values if name not in scope]
    scope.update(values)
    _skip_numbers(values)
    return new


def _skip_numbers(names: Iterable[str]) -> None:
    """Dynamo numbers its globals per process and insists that a name is new: go on behind the other process's."""
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"__\w+?_(\d+)", name))]
    following = max(next(bytecode_transformation._unique_id_counter), *numbers, 0) + 1
    bytecode_transformation._unique_id_counter = itertools.count(following)


def _build_guards(entry: dict[str, Any], frame: _Frame) -> Any:
    """Guards of the stored kinds on the live values, as Dynamo builds them after a trace."""
    from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState
    from torch._guards import Guard, GuardsSet
    from torch.utils._ordered_set import OrderedSet

    state = OutputGraphGuardsState(
        local_scope=frame.locals,
        global_scope=frame.globals,
        torch_function_mode_stack=[],
        guard_on_key_order=set(entry["key_order"]),
        input_source_to_sizes_strides={
            source: {"size": size, "stride": stride} for source, (size, stride) in entry["sizes"].items()
        },
        dual_level=entry["dual_level"],
        functorch_layers=[],
        current_device=None,
        global_state_guard=convert_frame.initial_global_state or torch._C._dynamo.guards.GlobalStateGuard(),
        _guards=GuardsSet(
            OrderedSet(Guard(source, _create_fn(kind, extra)) for source, kind, extra, _ in entry["guards"])
        ),
        _aotautograd_guards=[],
        skip_guards_check=True,  # checked by the caller, which takes no for an answer
        name_of_builtins_dict_key_in_fglobals=entry["builtins"],
    )
    manager = OnceManager(
        frame.code,
        OutputGraphCommon(state),
        frame.cache_entries,
        shape_code_parts=entry["shapes"],
        model_untouched=entry["model_untouched"],
    )
    return manager.guard_manager


def _failed_guard(manager: Any, frame: _Frame) -> str:
    return str(guards.get_guard_fail_reason_helper(manager, frame.locals, frame.compile_id, None))


def _create_fn(kind: str, extra: dict[str, Any]) -> Any:
    create = getattr(guards.GuardBuilder, kind)
    return functools.partial(create, **extra) if extra else create


def _guarded_code(entry: dict[str, Any], frame: _Frame, manager: Any, finish: Finish) -> Any:
    from torch._dynamo.types import GuardedCode, wrap_guarded_code
    from torch._dynamo.utils import CleanupHook, CleanupManager, orig_code_map

    code = _load_code(entry["code"])
    run = finish(graph_file.load(entry["graph"]), entry["plan"], frame.options)
    name = next(name for name, what in entry["globals"].items() if what == ("graph",))
    frame.globals[name] = torch._dynamo.disable(run, reason="do not trace Dynamo-compiled graph")
    orig_code_map[code] = frame.code
    convert_frame.output_codes.add(code)
    # The graph goes with its code; the rest is modules and the like, which other loaded graphs may use too.
    CleanupManager.count += 1
    CleanupManager.instance[code] = [CleanupHook(frame.globals, name)]
    title = f"Torch-Compiled Region: {frame.compile_id}"
    return wrap_guarded_code(GuardedCode(code, manager, frame.compile_id, title))


_CODE_CONSTANTS = (*_CONSTANTS, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


def _dump_code(code: types.CodeType) -> Any:
    from torch._dynamo.package import SerializedCode

    _check_constants(code.co_consts)
    return SerializedCode.from_code_object(code)


def _check_constants(values: Any) -> None:
    for value in values:
        if isinstance(value, types.CodeType):
            _check_constants(value.co_consts)
        elif type(value) in (tuple, frozenset):
            _check_constants(value)
        elif not isinstance(value, _CODE_CONSTANTS):
            raise NotPortable(f"the bytecode has a constant of type {type(value).__name__}")


def _load_code(data: Any) -> types.CodeType:
    from torch._dynamo.package import SerializedCode

    code: types.CodeType = SerializedCode.to_code_object(data)
    return code


# ---- files ----------------------------------------------------------------------------------------------------


def open_folder() -> Path | None:
    """The folder of this user's compiled graphs, made if need be; None if it is off or not private to the user.

    What is in it is unpickled, so nobody else may be able to write there.
    """
    parent = cache_folder()
    if parent is None:
        return None
    folder = parent / "compiled"
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        facts = folder.lstat()
    except OSError as error:
        _note(f"no cache: {error}")
        return None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        log.warning("compile cache: off, %s must be a folder of yours with mode 700 (chmod 700 it)", folder)
        return None
    return folder


def _candidates(folder: Path, key: str) -> list[Path]:
    """Files of this key, the last used first."""
    times = {}
    for path in folder.glob(f"{key}-*.bin"):
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
    return sorted(times, key=lambda path: -times[path])[:MAX_CANDIDATES]


def _read(path: Path) -> bytes | None:
    """The contents if they are whole; a damaged file is taken away."""
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid():
            _note(f"not loaded: {path} is not a file of this user")
            return None
        data = path.read_bytes()
    except OSError as error:
        _note(f"not loaded: {error}")
        return None
    start = len(MAGIC) + 32
    if data[: len(MAGIC)] == MAGIC and hashlib.sha256(data[start:]).digest() == data[len(MAGIC) : start]:
        return data[start:]
    _note(f"not loaded: {path} is damaged")
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _write(folder: Path, key: str, data: bytes) -> None:
    """Whole or not at all, whoever else writes: a temporary file, renamed."""
    digest = hashlib.sha256(data)
    path = folder / f"{key}-{digest.hexdigest()[:16]}.bin"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + digest.digest() + data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _trim(folder)


def _trim(folder: Path) -> None:
    """Forget what was used longest ago, and temporary files that a killed process left."""
    facts = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            facts.append((path.stat().st_mtime, path.stat().st_size, path))
    kept = total = 0
    for modified, size, path in sorted(facts, key=lambda fact: -fact[0]):
        if path.suffix == ".tmp":
            forget = modified < time.time() - 3600
        else:
            kept, total = kept + 1, total + size
            forget = kept > MAX_FILES or total > MAX_BYTES
        if forget:
            with contextlib.suppress(OSError):
                path.unlink()


def _note(reason: str) -> None:
    log.info("compile cache: %s", reason)
    Statistics.reasons.append(reason)
    del Statistics.reasons[:-32]
