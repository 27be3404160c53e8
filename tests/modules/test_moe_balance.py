"""How `MoE` evens out expert load: the balance loss and the selection bias, over ranks too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffmoe_kernels import Balance, ExpertChoiceMoE, MoE
from diffmoe_kernels.testing import assert_close


def test_balance_loss_is_the_formula_and_has_its_gradient():
    layer = MoE(8, 16, 4, 2, balance=Balance(loss_weight=0.3))
    x = torch.randn(7, 8)
    _, aux = layer(x, return_aux=True)
    scores = (x @ layer.router.weight.t()).sigmoid()
    share = torch.zeros(4)
    for token in scores:
        share[token.topk(2).indices] += 1 / 14
    expected = 0.3 * 4 * sum(share[e] * (scores[:, e] / scores.sum(1)).mean() for e in range(4))
    assert_close(aux.loss, expected)
    ours = torch.autograd.grad(aux.loss, layer.router.weight)[0]
    assert_close(ours, torch.autograd.grad(expected, layer.router.weight)[0], tolerance=1e-5)


def test_balance_loss_is_its_weight_when_even_and_more_when_not():
    layer = MoE(8, 16, 4, 1, balance="loss", score_function="softmax")
    layer.router.weight.data = 50 * torch.eye(4, 8)
    even = layer(torch.eye(4, 8), return_aux=True)[1].loss
    assert even.item() == pytest.approx(0.01)
    hot = layer(torch.eye(4, 8)[:1].expand(4, 8), return_aux=True)[1].loss
    assert hot.item() == pytest.approx(0.04)


@pytest.mark.parametrize(
    "balance, expected",
    [
        (None, (0, 0)),
        ("bias", (1e-3, 0)),
        ("loss", (0, 1e-2)),
        ({"bias_rate": 0.1}, (0.1, 0)),  # as a file of options has it
        (Balance(0.1, 0.2), (0.1, 0.2)),
    ],
)
def test_forms_of_balance(balance, expected):
    layer = MoE(8, 16, 6, 2, balance=balance)
    assert (layer.balance.bias_rate, layer.balance.loss_weight) == expected
    assert (layer(torch.randn(4, 8), return_aux=True)[1].loss is not None) == (expected[1] > 0)


def test_loads_are_summed_over_the_ranks_that_have_the_layer(monkeypatch):
    """As under pipeline parallelism, where ranks have other layers."""
    asked = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: asked.append(group))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: {None: 4, "stage": 1}[group])
    for layer in (MoE(8, 16, 4, 2, balance="bias"), ExpertChoiceMoE(8, 16, 4, threshold_decay=0.0)):
        _, aux = layer(torch.randn(8, 8), return_aux=True)
        layer.update_routing_state(aux)
        layer.update_routing_state(aux, group="stage")
    assert asked == [None, "stage"] * 2
    assert_close(layer.expert_threshold, aux.capacity_quantile)


def test_update_moves_the_bias_against_the_load():
    layer = MoE(8, 16, 4, 1, balance=Balance(bias_rate=0.01))
    layer.router.weight.data = torch.eye(4, 8)
    tokens = torch.eye(4, 8)
    _, aux = layer(tokens[[0, 0, 0, 1, 1, 2, 2, 3]], return_aux=True)
    assert aux.expert_load.tolist() == [3, 2, 2, 1]
    layer.update_routing_state(aux)
    assert_close(layer.router.expert_bias, torch.tensor([-0.01, 0, 0, 0.01]))
    # Micro-batches count as one batch: their loads are summed before the sign is taken.
    halves = [layer(tokens[[0, 0, 1]], return_aux=True)[1], layer(tokens[[1, 1, 2, 3]], return_aux=True)[1]]
    layer.update_routing_state(halves)  # loads 2, 3, 1, 1 against a mean of 1.75
    assert_close(layer.router.expert_bias, torch.tensor([-0.02, -0.01, 0.01, 0.02]))


def test_update_evens_out_the_load():
    layer = MoE(8, 16, 4, 1, balance=Balance(bias_rate=0.02))
    x = torch.randn(400, 8) + layer.router.weight[0].detach()
    before = layer(x, return_aux=True)[1].expert_load.max()
    for _ in range(50):
        layer.update_routing_state(layer(x, return_aux=True)[1])
    assert before > 200
    assert layer(x, return_aux=True)[1].expert_load.max() < 120


def test_without_a_rate_the_bias_stays():
    layer = MoE(8, 16, 6, 2, balance="loss")
    layer.update_routing_state(layer(torch.randn(9, 8), return_aux=True)[1])
    assert not layer.router.expert_bias.any()


ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from diffmoe_kernels import Balance, MoE

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
layer = MoE(4, 8, 4, 1, balance=Balance(bias_rate=0.25))
layer.router.weight.data = torch.eye(4)
chosen = [0, 0, 0, 1, 2] if rank == 0 else [1, 1, 1, 1, 3]
_, aux = layer(torch.eye(4)[chosen], return_aux=True)
layer.update_routing_state(aux)
print(json.dumps({"load": aux.expert_load.tolist(), "bias": layer.router.expert_bias.tolist()}))
dist.destroy_process_group()
"""


def test_update_sums_the_load_over_ranks(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        told = [json.loads(process.communicate(timeout=60)[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [one["load"] for one in told] == [[3, 1, 1, 0], [0, 4, 0, 1]]  # each rank keeps its own record
    # Together 3, 5, 1, 1 against a mean of 2.5; rank 0 alone would leave experts 1 and 2 even.
    assert [one["bias"] for one in told] == [[-0.25, -0.25, 0.25, 0.25]] * 2


def test_update_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="aux: expected at least one record"):
        MoE(8, 4, 4, 2, balance="bias").update_routing_state([])
