"""Layers in dtypes and on devices other than their weights' usual ones."""

from __future__ import annotations

import pytest
import torch

from diffmoe_kernels import ExpertChoiceMoE, MoE, RoPEAttention
from diffmoe_kernels.testing import assert_close

LAYERS = {
    "plain": lambda **factory: MoE(16, 8, 4, 2, **factory),
    "shared": lambda **factory: MoE(16, 8, 4, 2, shared_intermediate_size=8, bias=True, **factory),
    "expert choice": lambda **factory: ExpertChoiceMoE(
        16, 8, 4, pool="sample", predictor=False, shared_intermediate_size=8, **factory
    ),
    "attention": lambda **factory: RoPEAttention(16, 2, rope="1d", qk_norm="rmsnorm", **factory),
    "grouped-query": lambda **factory: RoPEAttention(16, 4, num_kv_heads=2, rope="2d", grid_size=(2, 3), **factory),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward_and_backward_on_the_meta_device(layer, dtype) -> None:
    x = torch.empty(3, 6, 16, device="meta", dtype=dtype, requires_grad=True)
    y = layer(device="meta", dtype=dtype)(x)
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, dtype, x.shape)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_under_half_precision_inputs(layer, dtype) -> None:
    masters = layer()
    x = torch.randn(3, 6, 16)
    y = masters(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.float(), masters(x.to(dtype).float()), tolerance=0.03)
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in masters.parameters())


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_float64_inputs_stay_float64_under_autocast(layer) -> None:
    masters, x = layer(), torch.randn(3, 6, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = masters(x)
    assert y.dtype == torch.float64
    assert_close(y, masters(x), tolerance=1e-6)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_touched_under_inference_mode_still_trains(layer) -> None:
    """Tables are computed anew by every move; as inference tensors they would stop a later backward."""
    built = layer()
    with torch.inference_mode():
        built.to("cpu")
    built(torch.randn(3, 6, 16)).sum().backward()


def test_balance_goes_on_after_a_half_precision_bias() -> None:
    """0.5 + 0.001 is 0.5 in bfloat16: a bias loaded in it must not stay there."""
    layer = MoE(16, 8, 4, 1, balance="bias")
    layer.load_state_dict({key: value.bfloat16() for key, value in layer.state_dict().items()}, assign=True)
    layer.router.expert_bias.fill_(0.5)
    _, aux = layer(torch.randn(32, 16, dtype=torch.bfloat16), return_aux=True)
    layer.update_routing_state(aux)
    moved = layer.router.expert_bias
    assert moved.dtype == torch.float32
    assert (moved != 0.5).sum() >= 2
