"""No layer and no model reads a value back to the host, so that a GPU never waits and a CUDA graph can hold them.

What the launchers inside the custom operators do is seen by `tests/kernels`, which runs them on meta tensors, where
reading a value raises.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_kernels import ExpertChoiceMoE, MoE
from diffmoe_kernels.triton_support import HAS_TRITON
from models import create_model

aten = torch.ops.aten
SYNCS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.bincount),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.repeat_interleave, aten.argwhere, aten.where),
}
BACKENDS = ["torch", *(["triton"] if HAS_TRITON else [])]


class NoHostSync(TorchDispatchMode):
    """Raises where an operation's result, or its size, depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if packet in SYNCS and not (packet is aten.where and len(args) == 3):
            raise AssertionError(f"{function} waits for the device")
        if packet is aten.repeat_interleave and "output_size" in kwargs:
            return function(*args, **kwargs)
        indices = args[1] if packet in (aten.index, aten.index_put) else ()
        if any(one is not None and one.dtype == torch.bool for one in indices):
            raise AssertionError(f"{function} with a mask waits for the device")
        return function(*args, **kwargs)


def test_the_mode_sees_syncs():
    x = torch.arange(4)
    for sync in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: bool(x.any()),
        lambda: torch.where(x > 1),
        lambda: x.unique(),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
            sync()


LAYERS = {
    "token choice": lambda **how: MoE(16, 8, 4, 2, shared_intermediate_size=8, **how),
    "groups, balance loss, bias": lambda **how: MoE(
        16, 8, 4, 2, num_groups=2, top_groups=1, balance="loss", bias=True, activation="gelu_tanh", **how
    ),
    "capacity": lambda **how: MoE(16, 8, 4, 2, capacity_factor=1.0, score_function="softmax", **how),
    "expert choice": lambda **how: ExpertChoiceMoE(16, 8, 4, **how),
    "by token, bounded": lambda **how: ExpertChoiceMoE(16, 8, 4, inference="token", max_capacity_factor=1.5, **how),
    "of a sample": lambda **how: ExpertChoiceMoE(16, 8, 4, pool="sample", predictor=False, **how),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_layers(layer, backend):
    layer = layer(backend=backend)
    x = torch.randn(2, 8, 16, requires_grad=True)
    with NoHostSync():
        y, aux = layer(x, return_aux=True)
        loss = y.square().mean() + (0 if aux.loss is None else aux.loss)
        loss.backward()
    layer.update_routing_state(aux)
    layer.eval()
    with torch.no_grad():
        layer(x)  # the first evaluation reads the thresholds, to warn of those that no training moved
        with NoHostSync():
            layer(x)


@pytest.mark.parametrize("name", ["DSMoE-digits", "DiffMoE-digits", "TC-DiT-digits", "EC-DiT-digits", "JiTMoE-digits"])
@pytest.mark.filterwarnings("ignore:ExpertChoiceMoE is evaluated")
def test_models(name):
    model = create_model(name).eval()
    x = torch.randn(2, model.in_channels, model.input_size, model.input_size)
    inputs = (x, torch.tensor([0.2, 0.7]), torch.tensor([1, 2]))
    model(*inputs)
    with NoHostSync():
        model(*inputs).square().mean().backward()
