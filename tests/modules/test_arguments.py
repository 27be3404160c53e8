"""What every layer refuses alike."""

import numpy as np
import pytest
import torch

from diffmoe_kernels import ExpertChoiceMoE, MoE, RoPEAttention, ops
from diffmoe_kernels.modules import Experts, FeedForward

QKV = torch.zeros(1, 4, 4, 8)


@pytest.mark.parametrize(
    "message, build",
    [
        ("hidden_size: expected an integer, got 8.0", lambda: MoE(8.0, 8, 4, 2)),
        ("top_k: expected an integer, got '2'", lambda: MoE(8, 8, 4, "2")),
        ("num_experts: expected an integer, got 4.0", lambda: ExpertChoiceMoE(8, 8, 4.0)),
        ("hidden_size: expected an integer, got 8.0", lambda: Experts(8.0, 8, 4)),
        ("intermediate_size: expected an integer, got '8'", lambda: FeedForward(8, "8")),
        ("num_heads: expected an integer, got 2.0", lambda: RoPEAttention(8, 2.0)),
        ("head_dim: expected an integer, got '4'", lambda: RoPEAttention(8, 2, head_dim="4")),
        ("num_kv_heads: expected an integer, got 1.0", lambda: ops.rope_attention(QKV, num_kv_heads=1.0)),
        (
            "num_prefix_tokens: expected an integer, got 1.0",
            lambda: ops.rope_attention(QKV, num_kv_heads=1, num_prefix_tokens=1.0),
        ),
    ],
)
def test_sizes_that_are_no_integers(message, build):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    "message, build",
    [
        ("intermediate_size: expected at least 1, got 0", lambda: Experts(8, 0, 4)),
        ("num_experts: expected at least 1, got 0", lambda: Experts(8, 8, 0)),
        ("intermediate_size: expected at least 1, got -1", lambda: FeedForward(8, -1)),
    ],
)
def test_networks_of_nothing(message, build):
    with pytest.raises(ValueError, match=message):
        build()


def test_sizes_of_numpy_are_integers():
    assert MoE(*map(np.int64, (8, 8, 4, 2)))(torch.randn(3, 8)).shape == (3, 8)


@pytest.mark.parametrize("network", [FeedForward, Experts])
def test_a_dropout_that_is_no_probability(network):
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got 2.0"):
        network(8, 8, *((4,) if network is Experts else ()), dropout=2.0)
