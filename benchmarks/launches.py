"""Ops whose cost to the host is timed, on so few tokens that the GPU is never waited for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe_kernels import Routing, ops

ON_HOST = "on the host"  # in the place of an op's name: what is timed is the host's work
OPS = ("permute", "permute of a bound", "unpermute", "router_topk")
TOKENS, WIDTH, EXPERTS, TOP_K = 64, 64, 8, 2


def calls(op: str, provider: str, device: str = "cuda") -> Callable[[], object]:
    """The op by a backend, or as a user of PyTorch writes it: of a bound where rows past the true count must be 0."""
    weights, ids = torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K)
    routing = Routing.from_topk(ids, weights, EXPERTS)
    x, logits = torch.randn(TOKENS, WIDTH, device=device), torch.randn(TOKENS, EXPERTS, device=device)
    rows = x[routing.token_indices]

    def sorted_choices() -> tuple[Tensor, ...]:
        weights, ids = logits.sigmoid().topk(TOP_K)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.zeros(EXPERTS, device=device, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
        gates = (weights / weights.sum(1, keepdim=True)).flatten()[order]
        return order // TOP_K, gates, sizes.cumsum(0).int()

    plain = {
        "permute": lambda: x.index_select(0, routing.token_indices),
        "permute of a bound": lambda: x.index_select(0, routing.token_indices).where(routing.row_is_valid[:, None], 0),
        "unpermute": lambda: torch.zeros_like(x).index_add_(0, routing.token_indices, rows * routing.gates[:, None]),
        "router_topk": sorted_choices,
    }
    by_backend = {
        "permute": lambda: ops.permute(x, routing, backend=provider),
        "permute of a bound": lambda: ops.permute(x, routing, backend=provider),
        "unpermute": lambda: ops.unpermute(rows, routing, backend=provider),
        "router_topk": lambda: ops.router_topk(logits, TOP_K, backend=provider),
    }
    return (plain if provider == "PyTorch" else by_backend)[op]
