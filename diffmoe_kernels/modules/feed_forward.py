"""Feed-forward networks: one for all tokens, and many for routed tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend, check_backend
from diffmoe_kernels.checks import check_choice, check_dropout, check_floating, check_sizes
from diffmoe_kernels.modules.linear import Linear
from diffmoe_kernels.ops.experts import ACTIVATIONS
from diffmoe_kernels.ops.experts.reference import activate
from diffmoe_kernels.routing import Routing


class FeedForward(nn.Module):
    """The network of one expert, for every token: a shared expert or a dense SwiGLU.

    Parameters: ``gate_up_proj`` (2I, D), gate rows first, for "swiglu", ``up_proj`` (I, D) for the other activations;
    ``down_proj`` (D, I); each an ``nn.Linear``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_choice("activation", activation, ACTIVATIONS)
        check_dropout(dropout)
        self.activation = activation
        self.dropout = dropout
        factory = {"bias": bias, "device": device, "dtype": dtype}
        if activation == "swiglu":
            self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, **factory)
        else:
            self.up_proj = Linear(hidden_size, intermediate_size, **factory)
        self.down_proj = Linear(intermediate_size, hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        up = self.gate_up_proj if self.activation == "swiglu" else self.up_proj
        return self.down_proj(F.dropout(activate(up(x), self.activation), self.dropout, self.training))


class Experts(nn.Module):
    """E feed-forward networks, each for the tokens routed to it (`ops.experts`).

    Wrapped by itself in FSDP2's ``fully_shard`` with a ``MixedPrecisionPolicy`` it wants ``cast_forward_inputs=False``:
    else FSDP2 rounds the routing's float32 gates on the way in.

    Parameters, laid out as Hugging Face does: ``gate_up_proj`` (E, 2I, D), gate rows first, for "swiglu", ``up_proj``
    (E, I, D) for the other activations; ``down_proj`` (E, D, I); with bias ``gate_up_proj_bias`` (E, 2I) or
    ``up_proj_bias`` (E, I), and ``down_proj_bias`` (E, D).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts)
        check_choice("activation", activation, ACTIVATIONS)
        check_dropout(dropout)
        self.activation = activation
        self.dropout = dropout
        self.backend = check_backend(backend)
        up_size = intermediate_size * (2 if activation == "swiglu" else 1)
        self.up_name = "gate_up_proj" if activation == "swiglu" else "up_proj"
        shapes = {
            self.up_name: (num_experts, up_size, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            vector = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"{name}_bias", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(fan_in), as ``nn.Linear`` draws each expert's matrices."""
        for name in (self.up_name, "down_proj"):
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, routing: Routing, residual: Tensor | None = None) -> Tensor:
        """(T, D), routing of T tokens, optional (T, D) to add -> (T, D)."""
        return ops.experts(
            x,
            routing,
            getattr(self, self.up_name),
            self.down_proj,
            up_bias=getattr(self, f"{self.up_name}_bias"),
            down_bias=self.down_proj_bias,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
            residual=residual,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        bias = self.down_proj_bias is not None
        return f"{hidden_size}, {intermediate_size}, num_experts={num_experts}, {self.activation}, bias={bias}"


def expert_capacity(num_choices: int, num_experts: int, capacity_factor: float) -> int:
    """int(num_choices / num_experts * capacity_factor), at most num_choices; 0 of none.

    Raises:
        ValueError: choices, but a capacity below one: the experts would compute nothing.
    """
    capacity = min(int(num_choices / num_experts * capacity_factor), num_choices)
    if capacity < 1 <= num_choices:
        raise ValueError(
            f"x: with capacity_factor {capacity_factor} each of {num_experts} experts would take int({num_choices} / "
            f"{num_experts} * {capacity_factor}) = 0 tokens, expected at least 1: use a larger batch (and drop a last "
            "one that is smaller), or a larger capacity_factor"
        )
    return capacity


def tokens_and_residual(
    x: Tensor, residual: Tensor | None, hidden_size: int, shared_expert: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """A mixture's input as (T, D), and what its combine adds: the residual, the shared expert's output, both or None.

    Raises:
        TypeError: x or a residual that is not floating.
        ValueError: a last dimension other than D, fewer than two dimensions, or a residual of another shape.
    """
    check_floating("x", x)
    if residual is not None:
        check_floating("residual", residual)
    if x.dim() < 2 or x.shape[-1] != hidden_size:
        raise ValueError(f"x: expected shape (..., T, {hidden_size}), got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    tokens = x.reshape(-1, hidden_size)
    added = None if residual is None else residual.reshape(tokens.shape)
    if shared_expert is not None:
        shared = shared_expert(tokens)
        added = shared if added is None else added + shared
    return tokens, added
