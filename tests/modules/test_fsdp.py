"""Experts that FSDP2 shards by themselves, in mixed precision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
