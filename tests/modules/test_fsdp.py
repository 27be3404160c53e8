"""Layers that FSDP2 shards: experts by themselves, in mixed precision, and projections of attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from diffmoe_kernels import MoE

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
x = torch.randn(9, 16).bfloat16()
layer = MoE(16, 16, 4, 2)
expected = layer(x)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
fully_shard(layer.experts, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
layer.experts.register_forward_pre_hook(lambda module, arguments: print(arguments[1].gates.dtype))
y = layer(x)
y.float().square().sum().backward()
print(torch.equal(y, expected), layer.experts.down_proj.grad.dtype)
dist.destroy_process_group()
"""


def test_gates_stay_float32_where_inputs_are_not_cast() -> None:
    """As the docstring of `Experts` asks for; the casts of the weights are those that the op makes."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["torch.float32", "True", "torch.float32"], done.stderr


RECORDS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffmoe_kernels import ExpertChoiceMoE, MoE

rank, file, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.moe = MoE(16, 16, 4, 2, balance="loss") if kind == "MoE" else ExpertChoiceMoE(16, 16, 4)

    def forward(self, x):
        y, aux = self.moe(self.linear(x), return_aux=True)
        return x + y, aux


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        losses = []
        for block in self.blocks:
            x, aux = block(x)
            losses.append(aux.loss)
        return x, sum(losses)


def gradients(net, x):
    y, loss = net(x)
    loss.backward(retain_graph=True)  # of the records alone: nothing else asks for the weights before
    y.square().mean().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]


torch.manual_seed(0)
net, x = Net(), torch.randn(8, 16)  # the same on both ranks
expected = gradients(net, x)
net.zero_grad()
for block in net.blocks:
    fully_shard(block.moe, mesh=mesh)
fully_shard(net, mesh=mesh)
for one, other in zip(gradients(net, x), expected):
    torch.testing.assert_close(one, other)
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["MoE", "ExpertChoiceMoE"])
def test_the_loss_in_a_record_reaches_sharded_weights(kind: str, tmp_path) -> None:
    root = Path(__file__).parents[2]
    commands = [[sys.executable, "-c", RECORDS, str(rank), str(tmp_path / "store"), kind] for rank in range(2)]
    ranks = [
        subprocess.Popen(one, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands
    ]
    for output, error in [one.communicate(timeout=300) for one in ranks]:
        assert output.split() == ["equal"], error


ATTENTION = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffmoe_kernels import RoPEAttention

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
x = torch.randn(2, 16, 32)
layer = RoPEAttention(32, 4, num_kv_heads=2)
expected = layer(x)
grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
fully_shard(layer.get_submodule(sys.argv[1]), mesh=init_device_mesh("cpu", (1,)))
y = layer(x)
y.square().sum().backward()
torch.testing.assert_close(y, expected)
for parameter, grad in zip(layer.parameters(), grads):
    sharded = parameter.grad
    torch.testing.assert_close(sharded.to_local() if hasattr(sharded, "to_local") else sharded, grad)
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("sharded", ["", "k_proj"])
def test_projections_of_grouped_heads_may_be_sharded(sharded: str) -> None:
    """All of the layer, whose projections are one product then, or one of them, which then is called."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ATTENTION, sharded], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["equal"], done.stderr
