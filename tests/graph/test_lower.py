"""The native program of a graph does what the graph's own Python does."""

import ctypes
import mmap
import operator
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.fx import Graph, GraphModule

from unicorn_backend.assets import load_native
from unicorn_backend.graph.lower import lower

from ..ops.support import make_weight

load_native()
aten = torch.ops.aten
ARENA = torch.classes.unicorn.Arena


def graph(build, inputs, **attributes):
    """`build(graph, *placeholders)` -> outputs."""
    root = torch.nn.Module()
    root.__dict__.update(attributes)
    g = Graph()
    arguments = [g.placeholder(f"x{i}") for i in range(inputs)]
    g.output(tuple(build(g, *arguments)))
    return GraphModule(root, g)


def same(gm, *inputs):
    run = lower(gm)
    assert not isinstance(run, str), run
    expected, got = gm(*inputs), run(*inputs)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_tensors_numbers_lists_and_defaults():
    def build(g, x, n):
        call = g.call_function
        y = call(aten.add.Tensor, (x, 1))  # a number for a tensor: stays bf16
        z = call(aten.mul.Tensor, (y, n))
        both = call(aten.cat.default, ([x, z], -1))
        wide = call(aten.expand.default, (call(aten.unsqueeze.default, (both, 0)), [n, -1, -1]))
        return [
            y,
            wide,
            call(aten.to.dtype, (wide, torch.float32)),
            call(aten.new_ones.default, (x, [n, 2]), {"dtype": torch.bool}),
            n,
            None,
        ]

    same(graph(build, 2), torch.randn(2, 3).bfloat16(), 4)


OPERATORS = ("add", "sub", "mul", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge")


@pytest.mark.parametrize("function", [*(getattr(operator, name) for name in OPERATORS), torch.sym_min, torch.sym_max])
@pytest.mark.parametrize(("a", "b"), [(7, 3), (-7, 3), (7, -3), (-7, -3), (6, 3), (0, 5)])
def test_integers(function, a, b):
    same(graph(lambda g, x, y: [g.call_function(function, (x, y)), g.call_function(function, (x, 2))], 2), a, b)


def test_negation():
    same(graph(lambda g, x: [g.call_function(operator.neg, (x,))], 1), 5)


def test_several_results_and_in_place():
    def build(g, x):
        pair = g.call_function(aten.max.dim, (x, -1))
        first, second = (g.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        g.call_function(aten.add_.Tensor, (x, 1.0))
        return [second, first, x]

    gm = graph(build, 1)
    x = torch.randn(3, 4)
    expected, got = gm(x.clone()), lower(gm)(x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert torch.equal(x, expected[2])  # the caller's tensor was changed


def test_no_result():
    def build(g, cache, row):
        g.call_function(torch.ops.unicorn.push_window_.default, (cache, row, 1))
        return [cache]

    run = lower(graph(build, 2))
    assert run(torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 1, 2))[0].sum() == 2


def test_constants_of_the_module():
    add = lambda g, x: [g.call_function(aten.add.Tensor, (x, g.get_attr("offset")))]  # noqa: E731
    same(graph(add, 1, offset=torch.tensor([1.0, 2.0])), torch.zeros(2))


def test_what_is_no_operator_is_named():
    reason = lower(graph(lambda g, x: [g.call_function(torch.relu, (x,))], 1))
    assert isinstance(reason, str) and "relu" in reason


def test_floats_are_left_to_python():
    assert isinstance(lower(graph(lambda g, x: [g.call_function(operator.add, (x, 0.5))], 1)), str)


def test_errors_keep_their_kind():
    embedding = torch.ops.unicorn.embedding.default

    def build(g, ids, w):
        return [g.call_function(embedding, (ids, [w], 4, 8, torch.float32))]

    run = lower(graph(build, 2))
    with pytest.raises(IndexError, match="got id 9"):
        run(torch.tensor([9]), torch.randn(4, 8))
    with pytest.raises(ValueError):
        lower(graph(lambda g, x: [g.call_function(operator.floordiv, (x, 0))], 1))(1)


def test_gradients_flow_where_they_are_on():
    run = lower(graph(lambda g, x: [g.call_function(aten.mul.Tensor, (x, 3.0))], 1))
    x = torch.ones(2, requires_grad=True)
    run(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))


def test_memory_is_let_go_after_the_last_use():
    """A chain of 64 big intermediates needs the memory of two or three of them."""
    import resource

    def build(g, x):
        for _ in range(64):
            x = g.call_function(aten.add.Tensor, (x, 1.0))
        return [x]

    run = lower(graph(build, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(torch.zeros(8 << 20))  # 32 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 32 * 1024


def ffn_graph(g, x, *weights):
    gate, up, down = weights[:2], weights[2:4], weights[4:]
    ffn = torch.ops.unicorn.int4_ffn.default
    args = (x, None, None, 0.0, list(gate), list(up), list(down), [], "gelu_tanh", 64, 32, None, None, 0.0, x)
    y = g.call_function(ffn, args)
    return [g.call_function(ffn, (y, *args[1:-1], y))]


def ffn_weights():
    torch.manual_seed(0)
    shapes = ((64, 32), (64, 32), (32, 64))
    return [t for n, k in shapes for t in make_weight(n, k, "w4g32")]


def test_bound_inputs_give_the_same_bits():
    weights = ffn_weights()
    gm = graph(ffn_graph, 1 + len(weights))
    run = lower(gm)
    bound = run.bind(range(1, 1 + len(weights)), weights)
    with torch.no_grad():
        for tokens in (1, 3, 1):  # what was prepared for one size serves every other
            x = torch.randn(2, tokens, 32)
            assert torch.equal(bound(x)[0], run(x, *weights)[0]) and torch.equal(bound(x)[0], gm(x, *weights)[0])


def test_a_prepared_op_still_checks_what_it_is_given():
    weights = ffn_weights()
    bound = lower(graph(ffn_graph, 1 + len(weights))).bind(range(1, 1 + len(weights)), weights)
    with torch.no_grad():
        bound(torch.randn(1, 1, 32))
        with pytest.raises(RuntimeError, match=r"int4_ffn: x: got last dim 64, expected 32"):
            bound(torch.randn(1, 1, 64))
        with pytest.raises(RuntimeError, match="got 2 inputs, expected 1"):
            bound(torch.randn(1, 1, 32), torch.randn(1))


def test_sizes_of_other_inputs_are_read_off_them():
    def build(g, x, n, y):
        return [g.call_function(aten.mul.Tensor, (x, n)), g.call_function(operator.add, (n, 1)), y]

    bound = lower(graph(build, 3)).bind([2], [7], [(1, 0, 1)])
    for columns in (3, 5):
        x = torch.randn(2, columns)
        got = bound(x)
        assert torch.equal(got[0], x * columns) and got[1:] == (columns + 1, 7)
    with pytest.raises(RuntimeError, match="no input 2"):
        lower(graph(build, 3)).bind([2], [7], [(2, 0, 1)])


def test_only_bound_inputs_are_kept():
    weights = ffn_weights()
    bound = lower(graph(ffn_graph, 1 + len(weights))).bind(range(1, 1 + len(weights)), weights)
    x = torch.randn(1, 9, 32)  # more tokens than memory is kept for
    watched = weakref.ref(x)
    with torch.no_grad():
        out = bound(x)[0]
    users = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    del x
    assert watched() is None and users <= 2  # the tensor's, and that of the handle which asks
    assert torch._C._storage_Use_Count(out.untyped_storage()._cdata) <= 2


def test_memory_is_given_again_once_nobody_holds_it():
    weights = ffn_weights()
    bound = lower(graph(ffn_graph, 1 + len(weights))).bind(range(1, 1 + len(weights)), weights)
    x, other = torch.randn(2, 1, 1, 32)
    with torch.no_grad():
        first, want = bound(x)[0], bound(x)[0].clone()
        assert torch.equal(first, want)
        part = bound(other)[0][..., 3:]
        want_part = part.clone()
        assert torch.equal(first, want) and torch.equal(bound(x)[0], want) and torch.equal(part, want_part)
        place = bound(x)[0].data_ptr()
        assert bound(other)[0].data_ptr() == place and bound(x.expand(1, 3, 32))[0].data_ptr() != place
        shared = bound(x)[0].share_memory_()  # from here on another process may read it
        shared_place = shared.data_ptr()
        del shared
        assert bound(x)[0].data_ptr() != shared_place


def test_kept_memory_is_as_the_call_makes_it():
    """A tensor of an inference mode stays one for good, whatever memory it has."""
    weights = ffn_weights()
    bound = lower(graph(ffn_graph, 1 + len(weights))).bind(range(1, 1 + len(weights)), weights)
    x = torch.randn(1, 1, 32)
    for inference in (True, False, True):
        with torch.inference_mode(inference), torch.no_grad():
            out = bound(x)[0]
        assert out.is_inference() is inference and not out.requires_grad
        del out


def test_one_bound_program_in_several_threads():
    weights = ffn_weights()
    bound = lower(graph(ffn_graph, 1 + len(weights))).bind(range(1, 1 + len(weights)), weights)
    inputs = [torch.randn(1, 5, 32) for _ in range(4)]

    def many(x):
        with torch.no_grad():
            return [bound(x)[0] for _ in range(200)]

    expected = [many(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(many, inputs), expected, strict=True):
            assert all(torch.equal(one, want) for one in got)


def test_the_profiler_and_gradients_see_every_call():
    weights = ffn_weights()
    bound = lower(graph(ffn_graph, 1 + len(weights))).bind(range(1, 1 + len(weights)), weights)
    with torch.no_grad(), torch.profiler.profile() as profile:
        bound(torch.randn(1, 1, 32))
    assert sum(event.name == "unicorn::int4_ffn" for event in profile.events()) == 2
    with pytest.raises(RuntimeError, match="inference only"):
        bound(torch.randn(1, 1, 32, requires_grad=True))


def test_weights_in_files_are_read_ahead(tmp_path):
    """A program that fails in its second step: what the step would have read is in memory by then."""
    first, second = (make_weight(256, 4096, "w8c") for _ in range(2))
    path = tmp_path / "weights"
    pages = [-(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for t in (*first, *second)]
    mapped = torch.from_file(str(path), shared=True, size=sum(pages), dtype=torch.uint8)
    held = []
    for t, piece in zip((*first, *second), mapped.split(pages), strict=True):
        placed = piece[: t.nbytes].view(t.dtype).view(t.shape)
        placed.copy_(t)
        held.append(ARENA.leave(placed, False))
    evict(path, mapped)
    packed = held[len(first)]
    if resident(packed) > 0:
        pytest.skip("this file system keeps its files in memory")

    def build(g, x, *weights):
        one, two = weights[: len(first)], weights[len(first) :]
        y = g.call_function(torch.ops.unicorn.linear.default, (x, list(one), None, 256))
        return [g.call_function(torch.ops.unicorn.linear.default, (y, list(two), None, 256))]  # y is too narrow

    bound = lower(graph(build, 1 + len(held))).bind(range(1, 1 + len(held)), held)
    with torch.no_grad(), pytest.raises(RuntimeError):
        bound(torch.randn(1, 4096).bfloat16())
    end = time.monotonic() + 10
    while resident(packed) < 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert resident(packed) == 1


def evict(path, mapped):
    """Write the file, and drop it from memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file:
        address, size = ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes)
        assert libc.msync(address, size, 4) == 0  # MS_SYNC
        os.fsync(file.fileno())
        assert libc.madvise(address, size, 4) == 0  # MADV_DONTNEED: a mapped page is not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(t):
    """The share of a tensor's pages that are in memory, mapped or not."""
    begin = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    count = -(-(t.data_ptr() + t.nbytes - begin) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return sum(page & 1 for page in found) / count
