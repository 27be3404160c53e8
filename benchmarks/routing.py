"""What happens around the experts: routing, choice, and movement between token order and expert order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experts import TRAINING, gather_sum
from benchmarks.registry import FORWARD, Build, Case, Provider, Shape, Where, close, normal
from diffmoe_kernels import Routing, ops


class Function(nn.Module):
    """A function of the input and of fixed tensors."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.arguments)


def of(function: Callable[..., Any]) -> Build:
    """Builds a module of a function of the input, given choices and the shape."""
    return lambda shape, where, dtype: Function(function, choices(shape), shape)


def choices(shape: Shape) -> tuple[Tensor, Tensor, Routing]:
    """Random choices: topk_ids (T, K) int32, topk_weights (T, K), and their routing."""
    weights, ids = torch.rand(shape.tokens, shape.experts).topk(shape.top_k)
    return ids.int(), weights, Routing.from_topk(ids, weights, shape.experts)


def scores(shape: Shape, where: Where) -> Tensor:
    """(T, E) float32."""
    return normal(where, shape.tokens, shape.experts)


def probabilities(shape: Shape, where: Where) -> Tensor:
    """(T, E) float32, of the experts."""
    return scores(shape, where).softmax(-1)


def ids(shape: Shape, where: Where) -> Tensor:
    """(T, K) int32, distinct within a token."""
    return scores(shape, where).topk(shape.top_k).indices.int()


def rows(shape: Shape, where: Where) -> Tensor:
    """(R, D)."""
    return normal(where, shape.rows, shape.hidden).to(where.dtype)


def tokens(shape: Shape, where: Where) -> Tensor:
    """(T, D)."""
    return normal(where, shape.tokens, shape.hidden).to(where.dtype)


def row_experts(order: Tensor, counts: Tensor) -> Tensor:
    """(R,) the expert of each of the sorted rows."""
    return torch.searchsorted(counts.cumsum(0), torch.arange(order.numel(), device=order.device), right=True)


def same_choice(actual: Mapping[str, Any], expected: Mapping[str, Any], dtype: torch.dtype) -> None:
    """`router_topk`: the same experts but where two scores are level up to rounding, and the record of its own ids."""
    ours, right = actual["result"], expected["result"]
    changed = (ours.topk_ids != right.topk_ids).any(1).float().mean().item()
    assert changed < 1e-4, f"{changed:.2%} of the tokens chose other experts: no time"
    exactly = Routing.from_topk(ours.topk_ids, ours.topk_weights, right.router_scores.shape[1])
    same_record({"result": ours.routing}, {"result": exactly}, dtype)


def same_record(actual: Mapping[str, Any], expected: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A `Routing`, bit for bit; or who goes where, as (order or tokens, sizes of the experts), in any order."""
    ours, right = actual["result"], expected["result"]
    if isinstance(ours, Routing):
        for field, value in vars(right).items():
            assert torch.equal(getattr(ours, field), value), f"{field} differs: no time"
        return
    indices, counts = ours
    assert torch.equal(counts.int(), right.group_sizes), "the experts' sizes differ: no time"
    places = row_experts(indices, counts) * right.num_tokens + indices
    assert torch.equal(places.sort().values, right.row_experts * right.num_tokens + right.token_indices), (
        "the experts' tokens differ: no time"
    )


def same_slots(actual: Mapping[str, Any], expected: Mapping[str, Any], dtype: torch.dtype) -> None:
    """`token_choice_drop`: the same slots dropped, and as many."""
    for ours, right in zip(actual["result"], expected["result"], strict=True):
        assert torch.equal(ours, right), "other choices were dropped: no time"


def choice_capacity(shape: Shape) -> int:
    """C = K T / E: capacity factor 1."""
    return shape.rows // shape.experts


def argsort_bincount(ids: Tensor, given: tuple, shape: Shape) -> tuple[Tensor, Tensor]:
    """What users write to group the rows by expert: each row's token, and the experts' sizes."""
    flat = ids.flatten()
    return flat.argsort() // shape.top_k, flat.bincount(minlength=shape.experts)


def topk_of_experts(probabilities: Tensor, given: tuple, shape: Shape) -> tuple[Tensor, Tensor]:
    """What users write for expert choice: each expert's best tokens, in no order."""
    capacity = choice_capacity(shape)
    indices = probabilities.t().topk(capacity).indices.flatten()
    return indices, torch.full((shape.experts,), capacity, device=indices.device)


def from_topk_with(backend: str) -> Callable[..., Routing]:
    return lambda ids, given, shape: ops.routing_from_topk(ids, given[1], shape.experts, backend=backend)


def choice_drop_with(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda ids, given, shape: ops.token_choice_drop(
        ids, given[1], shape.experts, choice_capacity(shape), backend=backend
    )


def unpermute_with(backend: str) -> Callable[..., Tensor]:
    return lambda rows, given, shape: ops.unpermute(rows, given[2], backend=backend)


def permute_with(backend: str) -> Callable[..., Tensor]:
    return lambda x, given, shape: ops.permute(x, given[2], backend=backend)


def router_with(backend: str) -> Callable[..., ops.RouterTopK]:
    return lambda logits, given, shape: ops.router_topk(logits, shape.top_k, backend=backend)


def drop_with(backend: str) -> Callable[..., Routing]:
    return lambda scores, given, shape: ops.token_drop(scores, choice_capacity(shape), backend=backend)


@functools.cache
def thresholds(num_experts: int, device: torch.device) -> Tensor:
    """A prediction of 0.3 or more passes, about one in eight of the scores' softmax. Made before times are taken."""
    return torch.full((num_experts,), 0.3, device=device).sigmoid()


def predicted_with(backend: str) -> Callable[..., Routing]:
    def predicted(scores: Tensor, given: tuple, shape: Shape) -> Routing:
        return ops.token_drop_predicted(scores, scores, thresholds(shape.experts, scores.device), backend=backend)[0]

    return predicted


def loss_with(backend: str) -> Callable[..., Tensor]:
    return lambda logits, given, shape: ops.capacity_loss(logits, given[2], backend=backend)


def quantile_with(backend: str) -> Callable[..., Tensor]:
    return lambda logits, given, shape: ops.capacity_quantile(logits, choice_capacity(shape), backend=backend)


def combine_exactly(rows: Tensor, given: tuple, shape: Shape) -> Tensor:
    return ops.unpermute(rows.float(), given[2], backend="reference")


def combine_plainly(rows: Tensor, given: tuple, shape: Shape) -> Tensor:
    routing = given[2]
    return gather_sum(rows, routing.gates, routing.token_rows, shape.top_k)


def gather_plainly(x: Tensor, given: tuple, shape: Shape) -> Tensor:
    return x.index_select(0, given[2].token_indices)


def combine_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """2 R D operations; rows, gates, the rows' places and the tokens' offsets read, tokens written."""
    return 2 * shape.rows * shape.hidden, (shape.rows + shape.tokens) * shape.hidden * size + 4 * (
        2 * shape.rows + shape.tokens + 1
    )


def gather_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """Tokens and indices read once, rows written."""
    return 0, (shape.rows + shape.tokens) * shape.hidden * size + 4 * shape.rows


def record_bytes(shape: Shape) -> int:
    """A `Routing` written: three numbers a row, offsets of tokens and experts, 4 bytes each."""
    return 4 * (3 * shape.rows + shape.tokens + 1 + shape.experts)


def router_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """Logits read; scores, ids, weights and the record written."""
    return 0, 4 * (2 * shape.tokens * shape.experts + 2 * shape.rows) + record_bytes(shape)


def ids_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """Ids and weights read, the record written."""
    return 0, 8 * shape.rows + record_bytes(shape)


def drop_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """Scores read, the record written."""
    return 0, 4 * shape.tokens * shape.experts + record_bytes(shape)


def loss_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """Logits read."""
    return 0, 4 * shape.tokens * shape.experts


def slots_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """Ids and weights read, ids written."""
    return 0, 12 * shape.rows


def cases(where: Where) -> list[Case]:
    def ours(function: Callable[[str], Callable[..., Any]], *backends: str) -> dict[str, Provider]:
        return {name: Provider(of(function(name)), name) for name in backends}

    combine = {
        **ours(unpermute_with, "triton", "cuda", "torch"),
        "plain, compiled": Provider(of(combine_plainly), compiled=True),
    }
    gather = ours(permute_with, "triton", "cuda", "torch")
    router = ours(router_with, "triton", "cuda", "reference")
    # bincount waits for the device to learn how many values there are, so that no graph can hold it.
    users = {"argsort + bincount": Provider(of(argsort_bincount), captured=False)}
    given = {**ours(from_topk_with, "triton", "reference"), **users}
    choice_drop = ours(choice_drop_with, "triton", "cuda", "reference")
    drop = {**ours(drop_with, "triton", "cuda", "reference"), "topk": Provider(of(topk_of_experts))}
    predicted = ours(predicted_with, "triton", "cuda", "reference")
    loss, quantile = (ours(function, "triton", "reference") for function in (loss_with, quantile_with))
    found = []

    def add(op: str, name: str, *how: Any, sampling: bool) -> None:
        """At a training step's tokens, and at those of one sampling step of two images."""
        found.append(Case(op, name, FORWARD, TRAINING[name], *how))
        if sampling:
            found.append(Case(op, f"{name}, sampling 512", FORWARD, replace(TRAINING[name], tokens=512), *how))

    for name in ("DSMoE-L-E48", "DSMoE-S-E48"):
        large = name == "DSMoE-L-E48"
        add("unpermute", name, combine, rows, of(combine_exactly), combine_cost, sampling=large)
        add("permute", name, gather, tokens, of(gather_plainly), gather_cost, sampling=large)
    token_choice, expert_choice = "DSMoE-S-E48", "DiffMoE-L-E8"
    for op, name, providers, inputs, right, cost, agree in (
        ("router_topk", token_choice, router, scores, router_with, router_cost, same_choice),
        ("routing_from_topk", token_choice, given, ids, from_topk_with, ids_cost, same_record),
        ("token_choice_drop", token_choice, choice_drop, ids, choice_drop_with, slots_cost, same_slots),
        ("token_drop", expert_choice, drop, probabilities, drop_with, drop_cost, same_record),
        ("token_drop_predicted", expert_choice, predicted, probabilities, predicted_with, drop_cost, same_record),
        ("capacity_loss", expert_choice, loss, scores, loss_with, loss_cost, close),
        ("capacity_quantile", expert_choice, quantile, scores, quantile_with, loss_cost, close),
    ):
        add(op, name, providers, inputs, of(right("reference")), cost, agree, sampling=True)
    return found
