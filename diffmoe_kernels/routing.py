"""`Routing`: the record that passes from a router to the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

from diffmoe_kernels.checks import (
    at_least_float32,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    check_sizes,
)

MOST_ROWS = 2**31 - 2**14  # kernels count past the last by less than a tile


@dataclass(frozen=True, eq=False)
class Routing:
    """Which tokens each expert computes, and how its outputs are weighted.

    T tokens, E experts, R routed rows. A routed row is one token at one expert. Rows are ordered by expert and,
    within an expert, ascend by token. R is known on the host. Where the number of rows is known only on the device
    (dropped slots, predicted capacity), R is a bound and ``group_offsets[-1]`` is the true count: past it
    ``token_indices``, ``gates`` and ``token_rows`` are 0 and nothing reads them.

    Attributes:
        token_indices: (R,) int32, source token of each routed row.
        gates: (R,) float32, or float64 of float64 weights: differentiable weight of each row in the output.
        group_offsets: (E,) int32, inclusive end row of each expert, as ``offs`` of
            ``torch.nn.functional.grouped_mm``.
        token_offsets: (T + 1,) int32, CSR: the rows of token t are
            ``token_rows[token_offsets[t]:token_offsets[t + 1]]``.
        token_rows: (R,) int32, the rows of each token, ascending by top-k slot (token choice) or by expert
            (expert choice). With it, unpermute is a gather and a sum without atomics.
    """

    token_indices: Tensor
    gates: Tensor
    group_offsets: Tensor
    token_offsets: Tensor
    token_rows: Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_offsets.shape[0] - 1

    @property
    def num_experts(self) -> int:
        return self.group_offsets.shape[0]

    @property
    def num_rows(self) -> int:
        """R, the bound known on the host."""
        return self.token_indices.shape[0]

    @property
    def group_sizes(self) -> Tensor:
        """(E,) int32, rows of each expert."""
        return self.group_offsets.diff(prepend=self.group_offsets.new_zeros(1))

    @property
    def row_is_valid(self) -> Tensor:
        """(R,) bool, False past the true count."""
        return _arange(self.num_rows, self.group_offsets) < _last(self.group_offsets)

    @property
    def row_experts(self) -> Tensor:
        """(R,) int64, expert of each row; E past the true count."""
        rows = torch.arange(self.num_rows, device=self.group_offsets.device, dtype=torch.int32)
        return torch.searchsorted(self.group_offsets, rows, right=True)

    @staticmethod
    def from_topk(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Routing:
        """Builds the record from a token-choice router: each token names its experts.

        Args:
            topk_ids: (T, K) integer, the experts of each token; an id outside [0, E) is a dropped slot (past an
                expert's capacity, or an expert of another rank).
            topk_weights: (T, K) floating, the weight of each slot; the gradient of ``gates`` flows back to it.
            num_experts: E.

        Returns:
            A record of R = T * K rows.

        Raises:
            TypeError: ids or a num_experts that are not integers, or weights that are not floating.
            ValueError: shapes that differ or are not (T, K), different devices, or num_experts < 1.
        """
        check_integer("topk_ids", topk_ids)
        check_floating("topk_weights", topk_weights)
        check_same_device(topk_ids=topk_ids, topk_weights=topk_weights)
        if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
            raise ValueError(
                "topk_ids and topk_weights: expected one shape (T, K), got "
                f"{tuple(topk_ids.shape)} and {tuple(topk_weights.shape)}"
            )
        check_sizes(1, num_experts=num_experts)
        num_tokens, top_k = topk_ids.shape
        num_rows = num_tokens * top_k
        slot_experts = topk_ids.reshape(-1).long()
        kept = (slot_experts >= 0) & (slot_experts < num_experts)
        slot_experts = slot_experts.where(kept, num_experts)  # dropped slots sort behind the last expert
        slot_of_row = slot_experts.argsort(stable=True)
        rows = _arange(num_rows, slot_of_row)
        row_of_slot = torch.empty_like(slot_of_row).scatter_(0, slot_of_row, rows)

        group_offsets = _count(slot_experts, num_experts + 1)[:num_experts].cumsum(0)
        valid = rows < _last(group_offsets)
        # A kept slot goes to its rank among the kept ones, a dropped slot to the one place past the end.
        place = (kept.cumsum(0) - 1).where(kept, num_rows)
        token_rows = row_of_slot.new_zeros(num_rows + 1).scatter_(0, place, row_of_slot)[:num_rows]
        token_counts = kept.view(num_tokens, top_k).sum(1)
        gates = at_least_float32(topk_weights.reshape(-1)).gather(0, slot_of_row)
        return Routing(
            token_indices=(slot_of_row // max(top_k, 1)).where(valid, 0).int(),
            gates=gates.where(valid, 0),
            group_offsets=group_offsets.int(),
            token_offsets=_exclusive_offsets(token_counts),
            token_rows=token_rows.int(),
        )

    @staticmethod
    def from_expert_choice(
        token_indices: Tensor, gates: Tensor, num_tokens: int, expert_counts: Tensor | None = None
    ) -> Routing:
        """Builds the record from an expert-choice router: each expert names its tokens.

        Args:
            token_indices: (E, C) integer, the tokens of each expert; the chosen ones come first and ascend.
            gates: (E, C) floating, the weight of each choice; the gradient of ``Routing.gates`` flows back to it.
            num_tokens: T.
            expert_counts: (E,) integer, how many of the C places of each expert are chosen, at most C; all where
                None. Stays on the device, unchecked.

        Returns:
            A record of R = E * C rows.

        Raises:
            TypeError: indices, counts or a num_tokens that are not integers, or gates that are not floating.
            ValueError: shapes that differ or are not (E, C), different devices, counts that are not (E,), or a
                negative num_tokens.
        """
        check_integer("token_indices", token_indices)
        check_floating("gates", gates)
        if expert_counts is not None:
            check_integer("expert_counts", expert_counts)
        check_same_device(token_indices=token_indices, gates=gates, expert_counts=expert_counts)
        if token_indices.dim() != 2 or token_indices.shape != gates.shape:
            raise ValueError(
                "token_indices and gates: expected one shape (E, C), got "
                f"{tuple(token_indices.shape)} and {tuple(gates.shape)}"
            )
        check_sizes(0, num_tokens=num_tokens)
        num_experts, capacity = token_indices.shape
        num_rows = num_experts * capacity
        if expert_counts is None:
            expert_counts = torch.full((num_experts,), capacity, device=token_indices.device)
        check_shape("expert_counts", expert_counts, num_experts)
        group_offsets = expert_counts.long().cumsum(0)
        places = _arange(num_rows, group_offsets)
        valid = places < _last(group_offsets)
        # Row r of expert e sits at place r - start[e] of that expert's list.
        expert = torch.searchsorted(group_offsets, places, right=True).clamp_(max=max(num_experts - 1, 0))
        start = group_offsets - expert_counts.long()
        source = (expert * capacity + places - start[expert]).where(valid, 0)
        tokens = token_indices.reshape(-1).long()[source]
        by_token = tokens.where(valid, num_tokens)
        token_rows = by_token.argsort(stable=True)
        row_gates = at_least_float32(gates.reshape(-1)).gather(0, source)
        return Routing(
            token_indices=tokens.where(valid, 0).int(),
            gates=row_gates.where(valid, 0),
            group_offsets=group_offsets.int(),
            token_offsets=_exclusive_offsets(_count(by_token, num_tokens + 1)[:num_tokens]),
            token_rows=token_rows.where(valid, 0).int(),
        )


def check_routing(routing: Routing) -> None:
    """Raises TypeError unless ``routing`` is a `Routing` of int32 or int64 and floating gates, ValueError unless its
    tensors fit each other."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}; see Routing.from_topk")
    for name in ("token_indices", "group_offsets", "token_offsets", "token_rows"):
        tensor = getattr(routing, name)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"routing.{name}: expected torch.int32, or int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"routing.{name}: expected 1 dimension, got shape {tuple(tensor.shape)}")
    if routing.gates.dtype is not torch.float32:
        check_floating("routing.gates", routing.gates)
    if routing.token_offsets.shape[0] == 0:
        raise ValueError("routing.token_offsets: expected T + 1 offsets, got none")
    rows, device = routing.token_indices.shape, routing.token_indices.device
    for name in ("gates", "token_rows"):
        if getattr(routing, name).shape != rows:
            raise ValueError(f"routing.{name}: expected shape {tuple(rows)}, got {tuple(getattr(routing, name).shape)}")
    for name in ("gates", "group_offsets", "token_offsets", "token_rows"):
        if getattr(routing, name).device != device:
            found = f"token_indices on {device}, {name} on {getattr(routing, name).device}"
            raise ValueError(f"routing: tensors on different devices: {found}")


def _arange(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)


def _last(offsets: Tensor) -> Tensor:
    return offsets[-1:]


def _count(values: Tensor, num_values: int) -> Tensor:
    """How often each of 0 .. num_values - 1 occurs; bincount without its host sync."""
    ones = torch.ones_like(values)
    return values.new_zeros(num_values).scatter_add_(0, values, ones)


def _exclusive_offsets(counts: Tensor) -> Tensor:
    """(T,) counts -> (T + 1,) int32 offsets that begin with 0."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def empty_fields(make: Callable[..., Tensor], num_rows: int, num_tokens: int, num_experts: int) -> tuple[Tensor, ...]:
    """What kernels write: the fields of a `Routing`, the gates first, as opcheck wants a floating first output.

    make: a tensor's ``new_empty`` or ``new_zeros``.
    """
    integers = (num_rows, num_experts, num_tokens + 1, num_rows)
    return make(num_rows, dtype=torch.float32), *(make(length, dtype=torch.int32) for length in integers)


def check_rows(num_rows: int) -> None:
    """Raises ValueError where a record's int32 numbers can't count so many rows."""
    if num_rows > MOST_ROWS:
        raise ValueError(f"a routing holds at most {MOST_ROWS} rows, its numbers being int32; got {num_rows}")


def for_kernels(routing: Routing) -> Routing:
    """The record as the kernels read it: int32 indices and float32 gates, each without gaps; itself where it is so."""
    indices = (routing.token_indices, routing.group_offsets, routing.token_offsets, routing.token_rows)
    plain = routing.gates.dtype is torch.float32 and routing.gates.is_contiguous()
    for one in indices:
        plain = plain and one.dtype is torch.int32 and one.is_contiguous()
    if plain:
        return routing
    token_indices, *offsets = (one.to(torch.int32).contiguous() for one in indices)
    return Routing(token_indices, routing.gates.to(torch.float32).contiguous(), *offsets)


def register_record(kind: type) -> None:
    """Lets torch.compile, torch.export, activation checkpointing and FSDP2 see the tensors inside a dataclass."""
    _pytree.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")


register_record(Routing)
