"""The expert-choice MoE layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend, check_backend
from diffmoe_kernels.checks import (
    as_records,
    at_least_float32,
    check_choice,
    check_factor,
    check_finite,
    check_shape,
    check_sizes,
)
from diffmoe_kernels.modules.buffers import Float32Buffers
from diffmoe_kernels.modules.feed_forward import Experts, FeedForward, expert_capacity, tokens_and_residual
from diffmoe_kernels.modules.linear import Linear
from diffmoe_kernels.modules.router import ExpertChoiceRouter
from diffmoe_kernels.ops.token_drop import RULES
from diffmoe_kernels.routing import Routing, register_record

POOLS = ("batch", "sample")


@dataclass(frozen=True, eq=False)
class ExpertChoiceAux:
    """Statistics of one forward of an `ExpertChoiceMoE` layer.

    Attributes:
        expert_load: (E,) float32, how many tokens each expert took.
        num_dropped: () int64, routed rows (a token at an expert) that the bound on the predicted capacity dropped.
        loss: () float32, the capacity predictor's loss, in training with a predictor; else None.
        capacity_quantile: (E,) float32, the prediction that an expert's last chosen place corresponds to, in training
            with a predictor; else None.
    """

    expert_load: Tensor
    num_dropped: Tensor
    loss: Tensor | None
    capacity_quantile: Tensor | None


register_record(ExpertChoiceAux)


class ExpertChoiceMoE(Float32Buffers):
    """Mixture of experts in which each expert chooses its tokens (DiffMoE, arXiv:2503.14487; EC-DiT, arXiv:2410.02098).

    Drop-in for a feed-forward layer: (..., tokens, hidden_size) in and out. In training each expert takes the
    int(S / num_experts * capacity_factor) tokens of a pool of S that score highest for it. At inference the capacity
    predictor and the thresholds, an average of what training saw, say how many.

    So that these learn, call it in training with ``return_aux=True`` for (y, aux), add ``aux.loss`` to the loss, and
    call ``update_routing_state(aux)`` once per optimizer step.

    Submodules: ``router`` (`ExpertChoiceRouter`), ``experts`` (`Experts`), ``shared_expert`` (`FeedForward` or None),
    ``capacity_predictor`` (two linear layers, or None). Buffers with a predictor: ``expert_threshold`` (E,) and
    ``threshold_decay`` (1,), both float32.

    Args:
        hidden_size: D.
        intermediate_size: I, of each expert.
        num_experts: E.
        capacity_factor: experts per token on average; an attribute that a schedule may set.
        pool: "batch" chooses among all tokens of the batch (DiffMoE), "sample" among each sample's (EC-DiT).
        predictor: predict the capacity at inference; without it inference is as training.
        activation: "gelu_tanh", "swiglu" or "silu".
        bias: whether the experts' and the shared expert's projections have biases.
        shared_intermediate_size: width of an expert that sees every token, added unscaled; 0 for none.
        inference: "pool": the predictor sets each expert's count, the score picks the tokens (official; a sample's
            result depends on its batch). "token": each token goes to the experts whose threshold its own prediction
            passes (a sample's choice does not depend on its batch, unless max_capacity_factor drops some).
        max_capacity_factor: at inference an expert takes at most int(S / E * max_capacity_factor) tokens, but one if
            that is 0, drops those of the lowest score and counts them; None bounds it by S, all tokens.
        threshold_decay: of the thresholds' moving average.
        backend: of the choice and the experts, which have no "cuda"; see `diffmoe_kernels.backend`.

    Raises:
        ValueError: sizes that do not fit each other, unknown names.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        pool: str = "batch",
        predictor: bool = True,
        activation: str = "gelu_tanh",
        bias: bool = True,
        shared_intermediate_size: int = 0,
        inference: str = "pool",
        max_capacity_factor: float | None = None,
        threshold_decay: float = 0.95,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts)
        check_sizes(0, shared_intermediate_size=shared_intermediate_size)
        check_factor(capacity_factor=capacity_factor)
        if max_capacity_factor is not None:
            check_factor(max_capacity_factor=max_capacity_factor)
        check_finite(threshold_decay=threshold_decay)
        if not 0 <= threshold_decay < 1:
            raise ValueError(f"threshold_decay: expected a number in [0, 1), got {threshold_decay}")
        check_choice("pool", pool, POOLS)
        check_choice("inference", inference, RULES)
        if predictor and pool == "sample":
            raise ValueError("predictor: expected False with pool 'sample', whose capacity is fixed, got True")
        if not predictor and (inference != "pool" or max_capacity_factor is not None):
            raise ValueError("predictor: expected True with inference 'token' or a max_capacity_factor, got False")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.pool = pool
        self.inference = inference
        self.max_capacity_factor = max_capacity_factor
        factory = {"device": device, "dtype": dtype}
        network = {"activation": activation, "bias": bias, **factory}
        self.router = ExpertChoiceRouter(hidden_size, num_experts, **factory)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, backend=backend, **network)
        self.shared_expert = (
            FeedForward(hidden_size, shared_intermediate_size, **network) if shared_intermediate_size else None
        )
        self.capacity_predictor: nn.Module | None = None
        self._thresholds_seen = not predictor
        if predictor:
            self.capacity_predictor = nn.Sequential(
                Linear(hidden_size, hidden_size, **factory), nn.SiLU(), Linear(hidden_size, num_experts, **factory)
            )
            for name, size in (("expert_threshold", num_experts), ("threshold_decay", 1)):
                self.register_buffer(name, torch.empty(size, device=device, dtype=torch.float32))
        self._first_decay = threshold_decay
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Thresholds of 0 and their first decay; its submodules have their own."""
        if self.capacity_predictor is not None:
            self._thresholds_seen = False
            nn.init.zeros_(self.expert_threshold)
            nn.init.constant_(self.threshold_decay, self._first_decay)

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, ExpertChoiceAux]:
        """Lets the experts choose, computes and recombines.

        Args:
            x: (..., N, D) floating; with pool "sample" the samples have N tokens each.
            residual: x's shape, added to the result in the combine.
            return_aux: return (y, `ExpertChoiceAux`) instead of y. Under activation checkpointing the record's loss
                has a gradient with ``use_reentrant=False`` only.

        Returns:
            y: x's shape, in x's dtype or autocast's, or in the residual's where that is wider.

        Raises:
            ValueError: a last dimension other than D, a residual of another shape, or a pool so small that its capacity
                is under one token.
        """
        tokens, added = tokens_and_residual(x, residual, self.hidden_size, self.shared_expert)  # (T, D)
        scores = self.router(tokens)  # (T, E)
        if self.training or self.capacity_predictor is None:
            num_pools = max(math.prod(x.shape[:-2]), 1) if self.pool == "sample" else 1
            capacity = self._capacity(len(tokens) // num_pools)
            routing = ops.token_drop(scores, capacity, num_pools=num_pools, backend=self.backend)
            num_dropped = None
        else:
            routing, num_dropped = self._infer(tokens, scores)
        y = self.experts(tokens, routing, added).view(x.shape)
        return (y, self._aux(tokens, routing, num_dropped)) if return_aux else y

    @torch.no_grad()
    def update_routing_state(
        self, aux: ExpertChoiceAux | Sequence[ExpertChoiceAux], *, group: dist.ProcessGroup | None = None
    ) -> None:
        """Moves the thresholds towards what training chose. The trainer calls it once per optimizer step.

        Args:
            aux: the record of the step's forward in training mode, or those of its micro-batches. Quantiles are
                averaged over them, and the thresholds over the ranks where a process group is initialised.
            group: the ranks that have this layer, where not all have; all where None.

        Raises:
            TypeError: another object than a record of this layer's kind or a sequence of them.
            ValueError: no record, one of a forward in evaluation mode, or of a layer with another number of experts.
        """
        records = as_records(aux, ExpertChoiceAux)
        for record in records:
            check_shape("aux.expert_load", record.expert_load, self.num_experts)
        if self.capacity_predictor is None:
            return
        if any(record.capacity_quantile is None for record in records):
            raise ValueError("aux: expected records of forwards in training mode, got one of an evaluation")
        quantile = torch.stack([record.capacity_quantile for record in records]).mean(0)
        decay = at_least_float32(self.threshold_decay)
        threshold = at_least_float32(self.expert_threshold) * decay + (1 - decay) * quantile
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(threshold, group=group)
            threshold /= dist.get_world_size(group)
        self.assign_buffer("expert_threshold", threshold)

    @property
    def backend(self) -> Backend:
        """Of the choice and the experts."""
        return self.experts.backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self.experts.backend = check_backend(backend)

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}, pool={self.pool}, inference={self.inference}"

    def _capacity(self, pool_size: int) -> int:
        return expert_capacity(pool_size, self.num_experts, self.capacity_factor)

    def _infer(self, tokens: Tensor, scores: Tensor) -> tuple[Routing, Tensor]:
        self._warn_of_first_thresholds()
        bound = None
        if self.max_capacity_factor is not None:  # of a batch of any size, unlike the capacity in training
            bound = min(max(int(len(tokens) / self.num_experts * self.max_capacity_factor), 1), len(tokens))
        return ops.token_drop_predicted(
            scores,
            self.capacity_predictor(tokens.detach()),
            self.expert_threshold,
            rule=self.inference,
            max_capacity=bound,
            backend=self.backend,
        )

    def _warn_of_first_thresholds(self) -> None:
        """Once, since it reads values: thresholds of 0 send every token to every expert."""
        if self._thresholds_seen or torch.compiler.is_compiling() or self.expert_threshold.is_meta:
            return
        if type(self.expert_threshold) is not Tensor:  # a fake one has no values
            return
        if self.expert_threshold.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._thresholds_seen = True
        if not self.expert_threshold.any():
            warnings.warn(
                "ExpertChoiceMoE is evaluated with thresholds that were never updated: every token goes to every "
                "expert. Call update_routing_state(aux) once per training step, or load a trained checkpoint.",
                stacklevel=6,
            )

    def _aux(self, tokens: Tensor, routing: Routing, num_dropped: Tensor | None) -> ExpertChoiceAux:
        if num_dropped is None:
            num_dropped = routing.group_offsets.new_zeros((), dtype=torch.int64)
        loss = quantile = None
        if self.training and self.capacity_predictor is not None:
            logits = self.capacity_predictor(tokens.detach())  # (T, E); no gradient to the tokens
            loss = ops.capacity_loss(logits, routing, backend=self.backend)
            quantile = ops.capacity_quantile(logits, self._capacity(len(tokens)), backend=self.backend)
        return ExpertChoiceAux(routing.group_sizes.float(), num_dropped, loss, quantile)
