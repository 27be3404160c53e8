"""`grouped_gemm` in its four forms, both backends, against a loop over groups and against torch's grouped_mm."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_kernels import measured, ops
from diffmoe_kernels.ops.grouped_gemm import _torch
from diffmoe_kernels.testing import assert_close, check_accuracy, poisoned_allocations, value_and_grads
from diffmoe_kernels.triton_support import HAS_TRITON

BACKENDS = ("reference", "torch", *(["triton"] if HAS_TRITON else []))
FORMS = ("rows", "inner", "columns", "batched")
OFFSETS = {
    "even": [4, 8, 12],
    "empty": [0, 7, 7, 7, 12, 12],
    "one": [12],
    "hot": [0, 12, 12],
    "past": [3, 3, 8],  # rows 8 to 11 belong to no group
    "none": [0, 0],
}


def operands(form, num_groups, rows=12, m=16, k=32, n=24):
    shapes = {
        "rows": ((rows, k), (num_groups, k, n)),
        "inner": ((m, rows), (rows, n)),
        "columns": ((num_groups, m, k), (k, rows)),
        "batched": ((num_groups, m, k), (num_groups, k, n)),
    }
    return {name: torch.randn(shape) for name, shape in zip("xw", shapes[form], strict=True)}


def gemm_loop(x, w, offs, bias=None):
    """Element by element of the table in the docstring: one product per group."""
    if offs is None:
        return torch.stack([x[e] @ w[e] for e in range(len(x))])
    edges = [0, *offs.tolist()]
    if x.dim() == w.dim() == 2:
        return torch.stack([x[:, a:b] @ w[a:b] for a, b in zip(edges, edges[1:], strict=False)])
    lines = x.shape[0] if x.dim() == 2 else w.shape[1]
    out = []
    for line in range(lines):
        group = sum(line >= end for end in edges[1:])
        if x.dim() == 2:
            inside = (
                x[line] @ w[group] + (0 if bias is None else bias[group]) if group < len(w) else x.new_zeros(w.shape[2])
            )
        else:
            inside = x[group] @ w[:, line] if group < len(x) else x.new_zeros(x.shape[1])
        out.append(inside)
    graph = 0 * (x.sum() + w.sum())  # where no group reaches at all
    return torch.stack(out, dim=0 if x.dim() == 2 else 1) + graph


CASES = [(form, name) for form in FORMS[:3] for name in OFFSETS] + [("batched", None)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form, offsets", CASES)
def test_value_and_gradients(form, offsets, backend):
    offs = torch.tensor(OFFSETS[offsets], dtype=torch.int32) if offsets else None
    inputs = operands(form, len(offs) if offsets else 3)
    if form == "rows":
        inputs["bias"] = torch.randn(len(offs), 24)
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend == "reference")
    for dtype in dtypes:
        with poisoned_allocations():
            check_accuracy(
                lambda x, w, bias=None: ops.grouped_gemm(x, w, offs, bias=bias, backend=backend),
                lambda x, w, bias=None: gemm_loop(x, w, offs, bias),
                dtype,
                inputs,
            )


@pytest.mark.parametrize("form", FORMS)
def test_equals_grouped_mm(form):
    offs = torch.tensor([3, 5, 12], dtype=torch.int32)
    offs = None if form == "batched" else offs
    inputs = operands(form, 3)
    assert_close(ops.grouped_gemm(**inputs, offs=offs), F.grouped_mm(inputs["x"], inputs["w"], offs=offs))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    offs = None if form == "batched" else torch.tensor([2, 2, 4], dtype=torch.int32)
    inputs = operands(form, 3, rows=5, m=2, k=3, n=2)
    x, w = (tensor.double().requires_grad_() for tensor in inputs.values())
    bias = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True),) if form == "rows" else ()
    assert torch.autograd.gradcheck(
        lambda x, w, bias=None: ops.grouped_gemm(x, w, offs, bias=bias, backend="reference"), (x, w, *bias)
    )


@pytest.mark.parametrize("form", FORMS)
def test_auto_takes_odd_sizes_and_float64(form):
    offs = None if form == "batched" else torch.tensor([2, 2, 5], dtype=torch.int32)
    inputs = operands(form, 3, rows=5, m=7, k=5, n=3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_accuracy(lambda x, w: ops.grouped_gemm(x, w, offs), lambda x, w: gemm_loop(x, w, offs), dtype, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form, backend):
    offs = None if form == "batched" else torch.tensor([3, 3, 11], dtype=torch.int32)
    inputs = operands(form, 3, rows=13)
    reference = value_and_grads(lambda x, w: gemm_loop(x, w, offs), **inputs)
    for name, tensor in inputs.items():
        for layout in (transposed, every_other, spread):
            with poisoned_allocations():
                ours = value_and_grads(
                    lambda x, w: ops.grouped_gemm(x, w, offs, backend=backend), **{**inputs, name: layout(tensor)}
                )
            for key, expected in reference.items():
                assert_close(ours[key], expected, name=f"{key}, {name} {layout.__name__}")


def transposed(tensor):
    return tensor.mT.clone(memory_format=torch.contiguous_format).mT


def every_other(tensor):
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


def spread(tensor):
    return torch.stack([tensor] * 4, dim=-1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_stride_0_operands_and_gradients(form, backend):
    offs = None if form == "batched" else torch.tensor([3, 3, 12], dtype=torch.int32)
    inputs = operands(form, 3)
    inputs = {name: tensor[..., :1].expand_as(tensor) for name, tensor in inputs.items()}

    def grads(function):
        x, w = (tensor.detach().requires_grad_() for tensor in inputs.values())
        return torch.autograd.grad(function(x, w).sum(), (x, w))  # sum's gradient is one number, expanded

    ours = grads(lambda x, w: ops.grouped_gemm(x, w, offs, backend=backend))
    for grad, expected in zip(ours, grads(lambda x, w: gemm_loop(x, w, offs)), strict=True):
        assert_close(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form, dim_x, dim_w", [("rows", 0, None), ("inner", 1, 0), ("columns", None, 1)])
def test_past_the_last_group_nothing_is_read(form, dim_x, dim_w, backend):
    offs = torch.tensor([3, 3, 8], dtype=torch.int32)
    inputs = operands(form, 3)
    clean = value_and_grads(lambda x, w: ops.grouped_gemm(x, w, offs, backend=backend), **inputs)
    for name, dim in (("x", dim_x), ("w", dim_w)):
        if dim is not None:
            inputs[name].narrow(dim, 8, 4).fill_(torch.nan)
            assert not clean[f"grad of {name}"].narrow(dim, 8, 4).any()
    with poisoned_allocations():
        dirty = value_and_grads(lambda x, w: ops.grouped_gemm(x, w, offs, backend=backend), **inputs)
    for name, expected in clean.items():
        assert_close(dirty[name], expected, tolerance=0, name=name)


def test_master_weights_and_autocast():
    offs = torch.tensor([3, 3, 12], dtype=torch.int32)
    w, bias = torch.randn(3, 32, 24, requires_grad=True), torch.randn(3, 24, requires_grad=True)
    x = torch.randn(12, 32)
    masters = ops.grouped_gemm(x.bfloat16(), w, offs, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.grouped_gemm(x, w, offs, bias=bias)
        exact = ops.grouped_gemm(x.double(), w, offs, bias=bias)
    assert masters.dtype == cast.dtype == torch.bfloat16 and torch.equal(masters, cast)
    assert exact.dtype == torch.float64
    cast.sum().backward()
    assert w.grad.dtype == bias.grad.dtype == torch.float32
    assert_close(bias.grad, torch.tensor([3.0, 0.0, 9.0]).view(3, 1).expand(3, 24))


@pytest.mark.parametrize(
    "reason, shape_x, shape_w, dtype",
    [
        ("grouped_mm takes bfloat16, float16 and float32, not torch.float64", (4, 8), (2, 8, 8), torch.float64),
        ("whole 16 bytes, got a size of 6 in torch.float32", (4, 6), (2, 6, 8), torch.float32),
        ("whole 16 bytes, got a size of 12 in torch.bfloat16", (4, 8), (2, 8, 12), torch.bfloat16),
        ("grouped_mm takes no empty operand", (0, 8), (2, 8, 8), torch.float32),
    ],
)
def test_torch_says_why_it_cannot_run(reason, shape_x, shape_w, dtype):
    x, w = torch.zeros(shape_x, dtype=dtype), torch.zeros(shape_w, dtype=dtype)
    offs = torch.tensor([0, len(x)], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=f"grouped_gemm: backend 'torch' can't run here: .*{reason}"):
        ops.grouped_gemm(x, w, offs, backend="torch")
    assert ops.grouped_gemm(x, w, offs).shape == (len(x), w.shape[2])


X, W, OFFS = torch.zeros(5, 4), torch.zeros(3, 4, 2), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    "error, message, x, w, options",
    [
        (TypeError, "x: expected a floating dtype, got torch.int64", X.long(), W, {}),
        (TypeError, "w: expected a floating dtype, got torch.int64", X, W.long(), {}),
        (TypeError, "offs: expected torch.int32, got torch.int64", X, W, {"offs": OFFS.long()}),
        (TypeError, "bias: expected a floating dtype", X, W, {"bias": torch.zeros(3, 2, dtype=torch.int32)}),
        (ValueError, r"2 or 3 dimensions each, got \(4,\) and \(3, 4, 2\)", X[0], W, {}),
        (ValueError, r"w: expected 5 rows to match x \(4, 5\), got \(3, 4, 2\)", X.t(), W, {}),
        (ValueError, r"offs: expected \(E,\) group ends .* got None", X, W, {"offs": None}),
        (ValueError, r"offs: expected shape \(3,\), got \(2,\)", X, W, {"offs": OFFS[:2]}),
        (ValueError, r"offs: expected shape \(3,\), got \(2,\)", W.mT, X.t(), {"offs": OFFS[:2]}),
        (ValueError, r"offs: expected shape \(E,\), got \(3, 1\)", X.t(), X, {"offs": OFFS[:, None]}),
        (ValueError, "offs: expected None for two operands of 3 dimensions", W.mT, W, {}),
        (ValueError, r"w: expected shape \(2, 4, 2\), got \(3, 4, 2\)", W.mT[:2], W, {"offs": None}),
        (ValueError, "bias: expected None unless x is", X.t(), X, {"bias": torch.zeros(3, 4)}),
        (ValueError, r"bias: expected shape \(3, 2\), got \(3, 4\)", X, W, {"bias": torch.zeros(3, 4)}),
        (ValueError, "different devices: x on cpu, w on meta, offs on cpu", X, W.to("meta"), {}),
        (
            NotImplementedError,
            "grouped_gemm: there is no 'cuda' backend; this op has .*'torch', 'reference'",
            X,
            W,
            {"backend": "cuda"},
        ),
    ],
)
def test_rejects_bad_input(error, message, x, w, options):
    with pytest.raises(error, match=message):
        ops.grouped_gemm(x, w, **{"offs": OFFS, **options})


class Operands(TorchDispatchMode):
    """Collects (matrix, the dimension that the groups divide) of every `grouped_mm`, that of its backward too.

    Of its two operands and of its result.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._grouped_mm:
            x, w = args[:2]
            dim_x, dim_w = _torch._DIVIDED[x.dim(), w.dim()]
            out = function(*args, **(kwargs or {}))
            dim_out = {(2, 3): 0, (3, 2): 1}.get((x.dim(), w.dim()))
            self.seen += [(x, dim_x), (w, dim_w), (out, dim_out)]
            return out
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("form", FORMS[:3])
def test_groups_begin_where_a_gpu_can_read_them(form, column_major, device, monkeypatch):
    """On CUDA grouped_mm asserts whole 16 bytes between groups where their dimension is the one of stride 1.

    An assertion on the device ends the process (torch 2.11, `GroupMMCommon.cuh`).
    """
    if device == "cuda":  # its road; on a CPU small groups are padded
        monkeypatch.setattr(_torch, "pads_groups", lambda x: False)
    inputs = {name: one.bfloat16() for name, one in operands(form, 3, rows=24).items()}
    if column_major:
        inputs = {name: one.mT.contiguous().mT for name, one in inputs.items()}
    offs = torch.tensor([5, 5, 24], dtype=torch.int32)
    with Operands() as operands_of:
        value_and_grads(lambda x, w: ops.grouped_gemm(x, w, offs, backend="torch"), **inputs)
    assert len(operands_of.seen) == 9
    for operand, divided in operands_of.seen:
        strides = operand.stride()[-2:]
        assert sorted(strides)[0] == 1 and max(strides) % 8 == 0, strides
        if divided is not None:
            assert strides[divided] != 1, (form, operand.shape, strides)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        (None, torch.float32, False),
        ("9.0", torch.bfloat16, False),
        ("10.3", torch.bfloat16, False),
        ("9.0", torch.float16, True),
        ("8.0", torch.bfloat16, True),
        ("12.0", torch.bfloat16, True),
    ],
)
def test_where_grouped_mm_waits_auto_takes_the_kernels(monkeypatch, capability, dtype, expected):
    for module in (_torch, measured):
        monkeypatch.setattr(module, "capability_of", lambda device: capability)
    x, w, offs = torch.zeros(8, 16, dtype=dtype), torch.zeros(1, 16, 16, dtype=dtype), torch.tensor([8]).int()
    assert _torch.syncs_with_host(x) is expected
    if HAS_TRITON:
        implementations = ops.grouped_gemm.__globals__["_IMPLEMENTATIONS"]
        assert implementations["triton"].automatic(x, w, offs, None) is expected


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("form", ["rows", "inner"])
@pytest.mark.parametrize("frozen", ["x", "w"])
def test_a_frozen_factor_costs_no_product(form, frozen, monkeypatch):
    from diffmoe_kernels.ops.grouped_gemm import _library

    inputs = operands(form, 3)
    inputs["w" if frozen == "x" else "x"].requires_grad_()
    y = ops.grouped_gemm(**inputs, offs=torch.tensor(OFFSETS["even"]).int(), backend="triton")
    launched = []
    for name in ("multiply_rows", "weight_grad"):
        launch = getattr(_library, name)
        monkeypatch.setattr(_library, name, lambda *a, launch=launch, **k: launched.append(launch) or launch(*a, **k))
    y.sum().backward()
    assert len(launched) == 1


def test_offsets_with_gaps():
    offs = torch.tensor([[5, 0], [5, 0], [12, 0]], dtype=torch.int32)[:, 0]
    for form in FORMS[:3]:
        inputs = operands(form, 3)
        expected = ops.grouped_gemm(**inputs, offs=offs, backend="reference")
        assert_close(ops.grouped_gemm(**inputs, offs=offs, backend="triton"), expected)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bias_of_any_layout_and_dtype(monkeypatch, kind, dtype):
    """The kernel gets x's dtype: the interpreter would take float64 too, a GPU's compiler not."""
    from diffmoe_kernels.ops.grouped_gemm import _library

    seen = []

    def multiply_rows(*args, bias, **options):
        seen.append(bias.dtype)
        return launcher(*args, bias=bias, **options)

    launcher = _library.multiply_rows
    monkeypatch.setattr(_library, "multiply_rows", multiply_rows)
    offs, numbers = torch.tensor([3, 5, 12], dtype=torch.int32), torch.randn(24, 3, dtype=kind)
    inputs = {name: one.to(dtype) for name, one in operands("rows", 3).items()}
    for bias in (numbers.mT, numbers[:, 0].expand(3, 24), numbers[:1].mT.expand(3, 24)):
        expected = ops.grouped_gemm(**inputs, offs=offs, bias=bias, backend="reference")
        assert_close(ops.grouped_gemm(**inputs, offs=offs, bias=bias, backend="triton"), expected)
    assert seen == [dtype] * 3


@pytest.mark.parametrize("form", FORMS)
def test_what_grouped_mm_is_given_begins_at_whole_16_bytes(form, monkeypatch):
    """On CUDA it raises otherwise."""
    multiply, given = F.grouped_mm, []

    def recorded(x, w, **options):
        given.extend((x.data_ptr() % 16, w.data_ptr() % 16))
        return multiply(x, w, **options)

    monkeypatch.setattr(_torch.F, "grouped_mm", recorded)
    offs = None if form == "batched" else torch.tensor([4, 8, 12], dtype=torch.int32)
    inputs = {}
    for name, one in operands(form, 3).items():
        flat = torch.randn(one.numel() + 1)[1:]
        inputs[name] = flat.view(one.shape).requires_grad_()
        assert inputs[name].data_ptr() % 16
    out = ops.grouped_gemm(**inputs, offs=offs, backend="torch")
    assert_close(out, gemm_loop(**inputs, offs=offs))
    torch.autograd.grad(out.square().sum(), list(inputs.values()))
    assert given and not any(given)
