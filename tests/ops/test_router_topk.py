"""`router_topk` against a loop over tokens written from DeepSeek-V3's equations."""

import math

import numpy as np
import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.testing import assert_close, value_and_grads
from diffmoe_kernels.triton_support import INTERPRETED

# On a GPU test_router_topk_triton.py runs the kernels.
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter"))
BACKENDS = ["reference", TRITON]
CONFIGS = [
    {"top_k": 2},
    {"top_k": 1, "scaling_factor": 2.5},
    {"top_k": 3, "score_function": "softmax", "normalize_weights": False},
    {"top_k": 8, "score_function": "softmax"},
    {"top_k": 2, "num_groups": 4, "top_groups": 2, "scaling_factor": 0.5},
    {"top_k": 3, "num_groups": 2, "top_groups": 1, "masked_group_fill": 0.0},
    {"top_k": 2, "num_groups": 8, "top_groups": 3},
]


def router_loop(
    logits,
    bias,
    top_k,
    score_function="sigmoid",
    num_groups=1,
    top_groups=1,
    masked_group_fill=-math.inf,
    normalize_weights=True,
    scaling_factor=1.0,
):
    """(ids, weights) of float64 logits, token by token."""
    all_ids, all_weights = [], []
    for row in logits:
        scores = 1 / (1 + np.exp(-row)) if score_function == "sigmoid" else np.exp(row) / np.exp(row).sum()
        biased = scores + bias
        groups = np.split(np.arange(len(row)), num_groups)
        group_scores = [sum(sorted(biased[group])[-2:]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_groups]
        for g, group in enumerate(groups):
            if g not in best:
                biased[group] = masked_group_fill
        ids = sorted(range(len(row)), key=lambda e: (-biased[e], e))[:top_k]
        weights = scores[ids]
        if normalize_weights and top_k > 1:
            weights = weights / weights.sum()
        all_ids.append(ids)
        all_weights.append(weights * scaling_factor)
    return np.array(all_ids), np.array(all_weights)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_matches_the_loop(config, with_bias):
    logits = torch.randn(50, 8, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64) if with_bias else None
    ids, weights = router_loop(logits.numpy(), bias.numpy() if with_bias else 0.0, **config)
    out = ops.router_topk(logits, expert_bias=bias, **config)
    assert out.topk_ids.tolist() == ids.tolist() and out.topk_ids.dtype == torch.int32
    assert_close(out.topk_weights, torch.from_numpy(weights))
    scores = logits.sigmoid() if config.get("score_function") != "softmax" else logits.softmax(1)
    assert_close(out.router_scores, scores)
    rows = zip(out.routing.token_indices.tolist(), out.routing.row_experts.tolist(), out.routing.gates, strict=True)
    by_row = {(token, expert): gate for token, expert, gate in rows}
    for token, (experts, gates) in enumerate(zip(ids, weights, strict=True)):
        for expert, gate in zip(experts, gates, strict=True):
            assert by_row.pop((token, int(expert))).item() == pytest.approx(gate)
    assert not by_row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32(dtype, backend):
    logits = torch.randn(40, 8).to(dtype).requires_grad_()
    out = ops.router_topk(logits, 3, backend=backend)
    exact = ops.router_topk(logits.double(), 3)
    assert torch.equal(out.topk_ids, exact.topk_ids)
    for name in ("topk_weights", "router_scores"):
        assert_close(getattr(out, name), getattr(exact, name), dtype=torch.float32, name=name)
    assert out.routing.gates.dtype == torch.float32
    out.topk_weights.sum().backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_arithmetic_is_float32_under_autocast(backend):
    logits = torch.randn(40, 8)
    bias = torch.randn(8) * 1e-3
    plain = ops.router_topk(logits, 3, expert_bias=bias, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.router_topk(logits, 3, expert_bias=bias, backend=backend)
    for name in ("topk_ids", "topk_weights", "router_scores"):
        assert torch.equal(getattr(cast, name), getattr(plain, name))


@pytest.mark.parametrize("config", CONFIGS)
def test_gradcheck(config):
    # Distinct scores, well apart: no choice flips under gradcheck's steps.
    logits = torch.stack([torch.linspace(-2, 2, 8, dtype=torch.float64)[torch.randperm(8)] for _ in range(2)])
    logits += 0.01 * torch.randn(2, 8)

    def weights_and_scores(logits):
        out = ops.router_topk(logits, **config)
        return out.topk_weights, out.router_scores, out.routing.gates

    assert torch.autograd.gradcheck(weights_and_scores, (logits.requires_grad_(),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_moves_the_choice_but_not_the_weight(backend):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0], requires_grad=True)
    out = ops.router_topk(logits, 1, expert_bias=bias, backend=backend)
    assert out.topk_ids.tolist() == [[3]]
    assert out.topk_weights.item() == pytest.approx(1 / (1 + math.e))
    assert_close(out.router_scores, logits.sigmoid())
    assert not out.topk_weights.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_choice_keeps_its_score(backend):
    out = ops.router_topk(torch.zeros(3, 4), 1, normalize_weights=True, backend=backend)
    assert out.topk_weights.tolist() == [[0.5]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend):
    out = ops.router_topk(torch.zeros(2, 6), 3, backend=backend)
    assert out.topk_ids.tolist() == [[0, 1, 2]] * 2
    groups = ops.router_topk(torch.zeros(2, 6), 3, num_groups=3, top_groups=2, backend=backend)
    assert groups.topk_ids.tolist() == [[0, 1, 2]] * 2
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0, 2.0, 0.0]])
    assert ops.router_topk(logits, 5, backend=backend).topk_ids.tolist() == [[2, 4, 1, 3, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fill_of_masked_groups(backend):
    """With negative biased scores the official fill of 0.0 lets the masked experts win; -inf does not."""
    logits = torch.zeros(1, 4)
    bias = torch.tensor([-1.0, -1.1, -2.0, -2.0])
    choose = {"top_k": 2, "expert_bias": bias, "num_groups": 2, "top_groups": 1}
    assert ops.router_topk(logits, **choose, backend=backend).topk_ids.tolist() == [[0, 1]]
    assert ops.router_topk(logits, **choose, masked_group_fill=0.0, backend=backend).topk_ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_no_tokens(backend):
    def weights(logits):
        return ops.router_topk(logits, 3, backend=backend).topk_weights

    for logits in (torch.randn(8, 20).t(), torch.randn(20, 16)[:, ::2], torch.randn(8).expand(20, 8)):
        ours = value_and_grads(weights, logits=logits)
        dense = value_and_grads(weights, logits=logits.contiguous())
        for name, expected in dense.items():
            assert_close(ours[name], expected, name=name)
    empty = ops.router_topk(torch.zeros(0, 8), 3, num_groups=2, backend=backend)
    assert empty.topk_ids.shape == (0, 3) and empty.routing.num_rows == 0


LOGITS = torch.zeros(5, 6)


@pytest.mark.parametrize(
    "error, message, logits, options",
    [
        (TypeError, "router_logits: expected a floating dtype, got torch.int64", LOGITS.long(), {}),
        (ValueError, r"router_logits: expected shape \(T, E\), got \(6,\)", LOGITS[0], {}),
        (
            TypeError,
            "expert_bias: expected a floating dtype, got torch.int64",
            LOGITS,
            {"expert_bias": LOGITS[0].long()},
        ),
        (ValueError, r"expert_bias: expected shape \(6,\), got \(5,\)", LOGITS, {"expert_bias": LOGITS[:, 0]}),
        (ValueError, "router_logits on cpu, expert_bias on meta", LOGITS, {"expert_bias": LOGITS[0].to("meta")}),
        (ValueError, "top_k: expected 1 to num_experts = 6, got 7", LOGITS, {"top_k": 7}),
        (ValueError, "top_k: expected 1 to num_experts = 6, got 0", LOGITS, {"top_k": 0}),
        (
            ValueError,
            "score_function: expected one of 'sigmoid', 'softmax', got 'relu'",
            LOGITS,
            {"score_function": "relu"},
        ),
        (ValueError, "num_groups: expected a divisor of num_experts = 6, got 4", LOGITS, {"num_groups": 4}),
        (TypeError, "num_groups: expected an integer, got 2.0", LOGITS, {"num_groups": 2.0}),
        (ValueError, "num_groups: expected a divisor of num_experts = 6, got 0", LOGITS, {"num_groups": 0}),
        (ValueError, "top_groups: expected 1 to num_groups = 2, got 3", LOGITS, {"num_groups": 2, "top_groups": 3}),
        (
            ValueError,
            "top_k: 1 of 3 groups hold 2 experts, fewer than top_k = 3; raise",
            LOGITS,
            {"num_groups": 3, "top_k": 3},
        ),
        (ValueError, "backend: expected one of 'auto', .*, got 'fast'", LOGITS, {"backend": "fast"}),
        (NotImplementedError, "router_topk: backend 'cuda' can't run", LOGITS.double(), {"backend": "cuda"}),
    ],
)
def test_rejects_bad_input(error, message, logits, options):
    with pytest.raises(error, match=message):
        ops.router_topk(logits, **{"top_k": 2, **options})
