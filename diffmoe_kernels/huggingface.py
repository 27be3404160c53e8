"""Experts of Hugging Face transformers, computed by `ops.experts`.

    from diffmoe_kernels.huggingface import register_experts

    register_experts()
    model.set_experts_implementation("diffmoe")  # or from_pretrained(..., experts_implementation="diffmoe")

Takes every model whose experts lie in transformers' common layout: `gate_up_proj` (E, 2I, D), or `up_proj` (E, I, D),
and `down_proj` (E, D, I), with or without biases.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend, check_backend

_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}  # transformers' and torch's classes


def register_experts(name: str = "diffmoe", *, backend: Backend = "auto") -> None:
    """Adds an experts implementation to transformers' registry; again under the same name replaces it.

    Args:
        name: what models ask for it by.
        backend: see `diffmoe_kernels.backend`.

    Raises:
        ImportError: transformers is missing, or too old for such a registry.
        ValueError: an unknown backend.
    """
    check_backend(backend)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(f"{error}; this needs: pip install transformers") from error
    ALL_EXPERTS_FUNCTIONS.register(name, partial(experts_forward, backend=backend))


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """What transformers calls in place of an experts module's forward.

    Args:
        experts: the module, whose parameters and flags are read.
        hidden_states: (T, D) floating.
        top_k_index: (T, K) integer; what is not below the number of experts is another rank's and adds nothing.
        top_k_weights: (T, K) floating.

    Returns:
        (T, D) in the dtype of hidden_states.

    Raises:
        NotImplementedError: weights in another layout, an activation or a gate that `ops.experts` does not have.
    """
    up_name = "gate_up_proj" if _flag(experts, "has_gate") else "up_proj"
    up_proj, down_proj = getattr(experts, up_name), experts.down_proj
    activation = _activation(experts)
    biases = {}
    if _flag(experts, "has_bias"):
        biases = {"up_bias": getattr(experts, f"{up_name}_bias"), "down_bias": experts.down_proj_bias}
    num_experts = down_proj.shape[0]
    routing = ops.routing_from_topk(top_k_index, top_k_weights, num_experts, backend=backend)
    y = ops.experts(hidden_states, routing, up_proj, down_proj, **biases, activation=activation, backend=backend)
    return y.to(hidden_states.dtype)


def _flag(experts: nn.Module, name: str) -> bool:
    """Of the experts' layout; older versions of transformers lack those for what they did not have."""
    return getattr(experts, name, name in ("has_gate", "is_concatenated"))


def _activation(experts: nn.Module) -> str:
    """The name of the experts' activation in `ops.experts`."""
    from transformers.integrations.moe import _default_apply_gate

    kind = type(experts).__name__
    has_gate = _flag(experts, "has_gate")
    if _flag(experts, "is_transposed") or not _flag(experts, "is_concatenated"):
        raise NotImplementedError(f"{kind}: its weights are transposed or interleaved; take another implementation")
    if _flag(experts, "has_post_expert_norm"):
        raise NotImplementedError(f"{kind}: it normalises after each expert; take another implementation")
    if has_gate and type(experts)._apply_gate is not _default_apply_gate:
        raise NotImplementedError(f"{kind}: its gate is its own; take another implementation")
    function = "silu" if experts.act_fn is F.silu else _ACTIVATIONS.get(type(experts.act_fn).__name__)
    if function == "silu":
        return "swiglu" if has_gate else "silu"
    if function is None or has_gate:
        raise NotImplementedError(f"{kind}: its activation {experts.act_fn} is not one of ops.experts")
    return function
