"""What users of PyTorch do with layers besides calling them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffmoe_kernels import ExpertChoiceMoE, MoE, RoPEAttention
from diffmoe_kernels.modules.linear import float32_linear
from diffmoe_kernels.testing import assert_close

LAYERS = {
    "MoE": lambda **options: MoE(16, 16, 4, 2, balance="loss", shared_intermediate_size=8, **options),
    "ExpertChoiceMoE": lambda **options: ExpertChoiceMoE(16, 16, 4, **options),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_backend_may_be_set_later(layer):
    layer = LAYERS[layer]()
    layer.backend = "reference"
    parts = [one for one in layer.modules() if hasattr(one, "backend")]
    assert len(parts) >= 2 and all(one.backend == "reference" for one in parts)
    with pytest.raises(ValueError, match="backend: expected one of"):
        layer.backend = "gpu"


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_rank_without_tokens_computes_nothing(layer, backend):
    layer, x = LAYERS[layer](backend=backend), torch.randn(0, 16, requires_grad=True)
    y, aux = layer(x, return_aux=True)
    (y.sum() + aux.loss).backward()
    assert y.shape == x.grad.shape == (0, 16)
    assert not any(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_record_may_be_exported_and_saved(layer, tmp_path):
    layer, x = LAYERS[layer](backend="reference").eval(), torch.randn(8, 16)
    program = torch.export.export(layer, (x,), {"return_aux": True})
    torch.export.save(program, tmp_path / "layer.pt2")
    y, aux = torch.export.load(tmp_path / "layer.pt2").module()(x, return_aux=True)
    expected, expected_aux = layer(x, return_aux=True)
    assert type(aux) is type(expected_aux)
    assert_close(y, expected)
    assert_close(aux.expert_load, expected_aux.expert_load)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_compiled_router_has_float32_gradients_under_autocast(layer):
    """torch.compile by itself would multiply them in bfloat16: pytorch/pytorch#179804."""
    layer, x = LAYERS[layer](backend="reference"), torch.randn(64, 16, dtype=torch.bfloat16)
    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(leaf)
        y.square().sum().backward()
        found.append((layer.router.weight.grad.clone(), leaf.grad))
    for compiled, eager in zip(*reversed(found), strict=True):
        assert_close(compiled, eager, tolerance=1e-6)


def test_a_float32_product_of_one_vector_under_autocast():
    x, weight = (torch.randn(size, requires_grad=True) for size in ((16,), (8, 16)))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(float32_linear(x, weight).sum(), (x, weight))
    for one, expected in zip(found, torch.autograd.grad(F.linear(x, weight).sum(), (x, weight)), strict=True):
        assert_close(one, expected, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_float32_product_under_autocast(dtype):
    """The same bits as without it, with gradients in their tensors' dtypes, and gradients of gradients."""
    x, weight = torch.randn(3, 5, 16, dtype=dtype), torch.randn(8, 16)
    results = []
    for enabled in (True, False):
        leaves = [one.clone().requires_grad_() for one in (x, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = float32_linear(*leaves)
        grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        results.append([y, *grads, *torch.autograd.grad(sum(one.square().sum() for one in grads), leaves)])
    exact = torch.promote_types(dtype, torch.float32)
    plain = F.linear(x.to(exact), weight.to(exact))
    assert torch.equal(results[0][0], plain) and [one.dtype for one in results[0]] == [one.dtype for one in results[1]]
    for under_autocast, without in zip(*results, strict=True):
        assert_close(under_autocast, without, tolerance=1e-6 if dtype != torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_search_for_nan_finds_none(layer):
    """What nobody wrote is filled with NaN; rows that no group reaches have such gradients within."""
    layer, x = LAYERS[layer](), torch.randn(8, 16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            y, aux = layer(x, return_aux=True)
            (y.sum() + aux.loss).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_layers_on_the_meta_device_are_made_real_one_by_one():
    """As FSDP does, the outer one first: each module allocates what is its own and initialises that."""
    expected = RoPEAttention(32, 4, grid_size=4, num_prefix_tokens=1)
    with torch.device("meta"):
        layer = nn.Sequential(RoPEAttention(32, 4, grid_size=4, num_prefix_tokens=1))
    for module in layer.modules():
        if list(module.parameters(recurse=False)) + list(module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    layer[0].load_state_dict(expected.state_dict())
    x = torch.randn(2, 17, 32)
    assert torch.equal(layer(x), expected(x))


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("weights, autocast", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_weights_of_the_other_half_type_under_autocast(num_kv_heads, weights, autocast):
    layer = RoPEAttention(32, 4, num_kv_heads=num_kv_heads, grid_size=4, dtype=weights)
    x = torch.randn(2, 16, 32)
    with torch.autocast("cpu", dtype=autocast):
        y = layer(x)
    assert y.dtype == autocast
    assert_close(y.float(), layer.float()(x), tolerance=5e-2)
