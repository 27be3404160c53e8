"""Grouped products within a compiled graph or on the meta device, where PyTorch can't trace how they are computed."""

from __future__ import annotations

import pytest
import torch

import diffmoe_kernels.ops as ops
from diffmoe_kernels import ExpertChoiceMoE, MoE
from diffmoe_kernels.ops.grouped_gemm import _traced
from diffmoe_kernels.testing import assert_close

OFFS = torch.tensor([3, 3, 8], dtype=torch.int32)  # of 9 rows: an empty group, and a row past the last one
FORMS = {"rows": ((9, 16), (3, 16, 8)), "outer": ((8, 9), (9, 16)), "columns": ((3, 8, 16), (16, 9))}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operands(form, dtype, bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [*FORMS[form], *([(3, 8)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outcome(function, *tensors, offs=OFFS, **options):
    leaves = [one.clone().requires_grad_() for one in tensors]
    y = function(*leaves[:2], offs, bias=(leaves[2:] or [None])[0], **options)
    return y, *torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize(("form", "bias"), [("rows", False), ("rows", True), ("outer", False), ("columns", False)])
def test_compiled_products_and_gradients(form, bias, backend, dtype) -> None:
    if backend == "torch" and dtype == torch.float64:
        pytest.skip("grouped_mm takes no float64")
    tensors = operands(form, dtype, bias)
    compiled = torch.compile(ops.grouped_gemm, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, *tensors, backend=backend)
    expected = outcome(ops.grouped_gemm, *tensors, backend=backend)
    exact = outcome(ops.grouped_gemm, *(one.double() for one in tensors), backend="reference")
    for one, eager, right in zip(found, expected, exact, strict=True):
        assert one.dtype == dtype
        assert_close(one, eager, tolerance=None if dtype != torch.float64 else 1e-12)
        assert_close(one.double(), right, tolerance={torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-6))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_on_the_meta_device(form, backend) -> None:
    tensors = [one.to("meta") for one in operands(form, torch.float32, False)]
    found = outcome(ops.grouped_gemm, *tensors, offs=OFFS.to("meta"), backend=backend)
    expected = outcome(ops.grouped_gemm, *operands(form, torch.float32, False))
    assert [(one.shape, one.is_meta) for one in found] == [(one.shape, True) for one in expected]


@pytest.mark.parametrize("by_definition", [False, True])
@pytest.mark.parametrize(("form", "bias"), [("rows", True), ("outer", False), ("columns", False)])
def test_opcheck(form, bias, by_definition) -> None:
    x, w, *rest = (one.requires_grad_() for one in operands(form, torch.float32, bias))
    torch.library.opcheck(_traced.products.overload, (x, w, OFFS, *(rest or [None]), by_definition))


LAYERS = {
    "MoE": lambda **o: MoE(32, 48, 6, 2, bias=True, shared_intermediate_size=16, **o),
    "MoE, sizes for no grouped_mm": lambda **o: MoE(30, 46, 6, 2, **o),
    "MoE, capacity": lambda **o: MoE(32, 48, 6, 2, capacity_factor=1.0, activation="silu", **o),
    "ExpertChoiceMoE": lambda **o: ExpertChoiceMoE(32, 48, 6, **o),
}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_float32_layer_is_one_graph(name, backend, compiler) -> None:
    """Values and gradients; sizes of groups in a graph are more than inductor can do (torch 2.13)."""
    if compiler == "inductor" and (backend == "reference" or name == "MoE, capacity"):
        pytest.skip("takes long, and the graph is that of another")
    torch.manual_seed(0)
    layer = LAYERS[name](backend=backend)
    x = torch.randn(3, 16, layer.router.weight.shape[1])
    results = []
    for call in (torch.compile(layer, backend=compiler, fullgraph=True), layer):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        used = [leaf, *(one for key, one in layer.named_parameters() if not key.startswith("capacity_predictor"))]
        results.append([y, *torch.autograd.grad(y.square().sum(), used)])
    for compiled, eager in zip(*results, strict=True):
        assert_close(compiled, eager, tolerance=1e-6)
