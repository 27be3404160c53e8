"""The whole expert computation as one differentiable op."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffmoe_kernels.backend import Backend, Implementation, run
from diffmoe_kernels.checks import (
    check_choice,
    check_dropout,
    check_floating,
    check_same_device,
    check_shape,
    compute_dtype,
)
from diffmoe_kernels.measured import experts_class, fastest
from diffmoe_kernels.ops.experts import _torch
from diffmoe_kernels.ops.experts.reference import experts_reference
from diffmoe_kernels.ops.grouped_gemm._torch import syncs_with_host
from diffmoe_kernels.ops.grouped_gemm._traced import traceable_reference
from diffmoe_kernels.routing import Routing, check_routing
from diffmoe_kernels.triton_support import HAS_TRITON

ACTIVATIONS = ("swiglu", "gelu_tanh", "silu")


def experts(
    x: Tensor,
    routing: Routing,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    dropout: float = 0.0,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Every token's gate-weighted sum of its experts' feed-forward networks.

    ``y[t] = residual[t] + sum over rows r of t, at expert e, of gates[r] * (act(x[t] up_e^T + b_e) down_e^T + c_e)``.
    T tokens, D = hidden_size, E experts, I = intermediate_size.

    Args:
        x: (T, D) floating.
        routing: of T tokens and E experts; its gates get a gradient.
        up_proj: (E, 2I, D) for "swiglu", gate rows first (Hugging Face's ``gate_up_proj``); (E, I, D) for the others.
        down_proj: (E, D, I).
        up_bias: (E, 2I) or (E, I); down_bias: (E, D).
        activation: "swiglu" silu(gate) * up (arXiv:2002.05202), "gelu_tanh" or "silu".
        dropout: probability of zeroing an element of the activation, from torch's global generator; not in "triton".
        residual: (T, D) floating, added to the result.
        backend: "reference", "torch" (grouped_mm; on a GPU with Triton this project's kernels gather, activate and
            combine between its products), "triton" or "auto".

    Weights and biases may be float32 masters: they are cast to the compute dtype (autocast's, else x's), and their
    gradients come back in their own dtype.

    Returns:
        (T, D) in the compute dtype, with a residual in what the two dtypes promote to.

    Raises:
        TypeError: arguments that are not floating.
        ValueError: shapes, devices, activation or dropout that do not fit.
    """
    check_routing(routing)
    check_choice("activation", activation, ACTIVATIONS)
    tensors = {"x": x, "up_proj": up_proj, "down_proj": down_proj}
    tensors |= {"up_bias": up_bias, "down_bias": down_bias, "residual": residual}
    for name, tensor in tensors.items():
        check_floating(name, tensor, optional=name in ("up_bias", "down_bias", "residual"))
    check_shape("x", x, routing.num_tokens, "D")
    hidden_size, num_experts = x.shape[1], routing.num_experts
    check_shape("down_proj", down_proj, num_experts, hidden_size, "I")
    up_size = down_proj.shape[2] * (2 if activation == "swiglu" else 1)
    check_shape("up_proj", up_proj, num_experts, up_size, hidden_size)
    check_shape("up_bias", up_bias, num_experts, up_size)
    check_shape("down_bias", down_bias, num_experts, hidden_size)
    check_shape("residual", residual, *x.shape)
    check_dropout(dropout)
    check_same_device(routing=routing.gates, **tensors)
    return run(
        "experts",
        backend,
        _IMPLEMENTATIONS,
        x.to(compute_dtype(x)),
        routing,
        up_proj,
        down_proj,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
        dropout=dropout,
        residual=residual,
    )


def _shape_class(x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, **_: object) -> str:
    training = torch.is_grad_enabled() and any(one.requires_grad for one in (x, routing.gates, up_proj, down_proj))
    return experts_class(routing.num_rows, routing.num_experts, down_proj.shape[2], x.dtype, training)


def _grouped_mm_is_unsuitable(x: Tensor, *args: Any, **options: Any) -> bool:
    return syncs_with_host(x) or _torch.why_not(x, *args, **options) is not None


_IMPLEMENTATIONS = {
    "torch": Implementation(_torch.experts_torch, _torch.why_not),
    "reference": Implementation(partial(experts_reference, gemm=traceable_reference)),
}
if HAS_TRITON:
    from diffmoe_kernels.ops.experts import _library

    _IMPLEMENTATIONS = {
        "triton": Implementation(
            partial(_library.experts_on_kernels, products="triton"),
            _library.why_not,
            automatic=fastest("experts", "triton", _shape_class, torch_is_unsuitable=_grouped_mm_is_unsuitable),
        ),
        **_IMPLEMENTATIONS,
    }
