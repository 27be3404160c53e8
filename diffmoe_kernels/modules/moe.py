"""The token-choice MoE layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend, check_backend
from diffmoe_kernels.checks import as_records, at_least_float32, check_factor, check_finite, check_shape, check_sizes
from diffmoe_kernels.modules.feed_forward import Experts, FeedForward, expert_capacity, tokens_and_residual
from diffmoe_kernels.modules.router import TopKRouter
from diffmoe_kernels.routing import Routing, register_record


@dataclass(frozen=True)
class Balance:
    """How expert load is evened out.

    Attributes:
        bias_rate: step of DeepSeek-V3's auxiliary-loss-free balancing (arXiv:2408.15664): once per optimizer step each
            expert's selection bias moves this far against the sign of its excess load. 0 leaves the bias alone.
        loss_weight: weight of the balance loss (arXiv:2412.19437, eq. 17 to 20, over the batch): the expert's share of
            the choices times its mean normalised score, summed over experts, times E. 0 computes no loss.
    """

    bias_rate: float = 0.0
    loss_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bias_rate", "loss_weight"):
            check_finite(**{name: getattr(self, name)})
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")

    @staticmethod
    def of(balance: Balance | Mapping[str, float] | str | None) -> Balance:
        """Each form in which `MoE` takes it. Raises ValueError for another."""
        if isinstance(balance, Balance):
            return balance
        if isinstance(balance, Mapping) and balance and set(balance) <= {"bias_rate", "loss_weight"}:
            return Balance(**balance)
        if balance is None or isinstance(balance, str) and balance in _BALANCE:
            return _BALANCE[balance]
        raise ValueError(
            f"balance: expected None, 'bias', 'loss' or a Balance, such as {{'bias_rate': 0.001}}, got {balance!r}"
        )


_BALANCE = {None: Balance(), "bias": Balance(bias_rate=1e-3), "loss": Balance(loss_weight=1e-2)}


@dataclass(frozen=True, eq=False)
class MoEAux:
    """Statistics of one forward of a `MoE` layer.

    Attributes:
        expert_load: (E,) float32, how many tokens chose each expert, before any drop.
        num_dropped: () int64, choices that the capacity dropped.
        loss: () float32, the weighted balance loss, or None where there is none.
    """

    expert_load: Tensor
    num_dropped: Tensor
    loss: Tensor | None


register_record(MoEAux)


class MoE(nn.Module):
    """Mixture of experts in which each token chooses its top-k experts (DSMoE, JiTMoE, DeepSeek-V3).

    Drop-in for a feed-forward layer: (..., tokens, hidden_size) in and out. Submodules: ``router`` (`TopKRouter`),
    ``experts`` (`Experts`), ``shared_expert`` (`FeedForward` or None).

    Args:
        hidden_size: D.
        intermediate_size: I, of each routed expert.
        num_experts: E.
        top_k: experts per token.
        activation: "swiglu", "gelu_tanh" or "silu".
        bias: whether the experts' and the shared expert's projections have biases.
        score_function: "sigmoid" or "softmax".
        normalize_weights: divide a token's weights by their sum, if top_k > 1.
        scaling_factor: multiplies the weights.
        num_groups, top_groups: a token chooses within its best top_groups of num_groups groups of experts.
        shared_intermediate_size: width of an expert that sees every token, added unscaled; 0 for none.
        capacity_factor: an expert keeps at most int(top_k * T / E * capacity_factor) of a batch's T tokens and drops
            those of the lowest weight, in training and in evaluation; None keeps all.
        balance: None, "bias" (rate 0.001), "loss" (weight 0.01), or a `Balance`, also as a mapping of its fields.
        dropout: on the activation, in training; the kernels have none, backend "triton" raises there.
        backend: of the router and the experts, which have no "cuda"; see `diffmoe_kernels.backend`.
        masked_group_fill: score of the experts of groups that were not chosen; see `ops.router_topk`.

    Raises:
        ValueError: sizes that do not fit each other, unknown names.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        score_function: str = "sigmoid",
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        shared_intermediate_size: int = 0,
        capacity_factor: float | None = None,
        balance: Balance | Mapping[str, float] | str | None = None,
        dropout: float = 0.0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        masked_group_fill: float = -math.inf,
    ) -> None:
        super().__init__()
        check_sizes(1, hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_sizes(0, shared_intermediate_size=shared_intermediate_size)
        if capacity_factor is not None:
            check_factor(capacity_factor=capacity_factor)
        self.hidden_size = hidden_size
        self.capacity_factor = capacity_factor
        self.balance = Balance.of(balance)
        factory = {"device": device, "dtype": dtype}
        network = {"activation": activation, "bias": bias, "dropout": dropout, **factory}
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            top_k,
            score_function=score_function,
            normalize_weights=normalize_weights,
            scaling_factor=scaling_factor,
            num_groups=num_groups,
            top_groups=top_groups,
            masked_group_fill=masked_group_fill,
            backend=backend,
            **factory,
        )
        self.experts = Experts(hidden_size, intermediate_size, num_experts, backend=backend, **network)
        self.shared_expert = (
            FeedForward(hidden_size, shared_intermediate_size, **network) if shared_intermediate_size else None
        )

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, MoEAux]:
        """Routes, computes and recombines.

        Args:
            x: (..., D) floating.
            residual: x's shape, added to the result in the combine.
            return_aux: return (y, `MoEAux`) instead of y. Under activation checkpointing the record's loss has a
                gradient with ``use_reentrant=False`` only.

        Returns:
            y: x's shape, in x's dtype or autocast's, or in the residual's where that is wider.

        Raises:
            ValueError: a last dimension other than D, a residual of another shape, or so few tokens that the experts'
                capacity is under one.
        """
        tokens, added = tokens_and_residual(x, residual, self.hidden_size, self.shared_expert)  # (T, D)
        choice = self.router(tokens)
        routing, num_dropped = self._bound(choice)
        y = self.experts(tokens, routing, added).view(x.shape)
        return (y, self._aux(choice, num_dropped)) if return_aux else y

    @torch.no_grad()
    def update_routing_state(self, aux: MoEAux | Sequence[MoEAux], *, group: dist.ProcessGroup | None = None) -> None:
        """Moves the selection bias against the load. The trainer calls it once per optimizer step.

        Args:
            aux: the record of the step's forward, or those of its micro-batches. Loads are summed over them, and over
                the ranks where a process group is initialised.
            group: the ranks that have this layer, where not all have; all where None.

        Raises:
            TypeError: another object than a record of this layer's kind or a sequence of them.
            ValueError: no record at all, or one of a layer with another number of experts.
        """
        records = as_records(aux, MoEAux)
        for record in records:
            check_shape("aux.expert_load", record.expert_load, self.router.num_experts)
        if not self.balance.bias_rate:
            return
        load = torch.stack([record.expert_load for record in records]).sum(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load, group=group)
        # A checkpoint in half precision leaves a bias that would not feel the step.
        bias = at_least_float32(self.router.expert_bias)
        self.router.assign_buffer("expert_bias", bias + self.balance.bias_rate * (load.mean() - load).sign())

    @property
    def backend(self) -> Backend:
        """Of the router and the experts, set together."""
        return self.experts.backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self.router.backend = self.experts.backend = check_backend(backend)

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}, balance={self.balance}"

    def _bound(self, choice: ops.RouterTopK) -> tuple[Routing, Tensor | None]:
        """The routing within the experts' capacity, and how many choices that dropped; None where there is no bound."""
        if self.capacity_factor is None:
            return choice.routing, None
        num_experts = self.router.num_experts
        capacity = expert_capacity(choice.topk_ids.numel(), num_experts, self.capacity_factor)
        backend = self.router.backend
        ids, num_dropped = ops.token_choice_drop(
            choice.topk_ids, choice.topk_weights, num_experts, capacity, backend=backend
        )
        return ops.routing_from_topk(ids, choice.topk_weights, num_experts, backend=backend), num_dropped

    def _aux(self, choice: ops.RouterTopK, num_dropped: Tensor | None) -> MoEAux:
        load = choice.routing.group_sizes.float()
        if num_dropped is None:
            num_dropped = load.new_zeros((), dtype=torch.int64)
        loss = None
        if self.balance.loss_weight:
            num_tokens, top_k = choice.topk_ids.shape
            shares = load / max(num_tokens * top_k, 1)  # (E,)
            scores = choice.router_scores / (choice.router_scores.sum(-1, keepdim=True) + 1e-20)
            mean_scores = scores.sum(0) / max(num_tokens, 1)  # (E,)
            loss = self.balance.loss_weight * load.numel() * (shares * mean_scores).sum()
        return MoEAux(load, num_dropped, loss)
