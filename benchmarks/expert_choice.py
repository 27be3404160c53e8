"""DiffMoE's whole layer, router and capacity predictor included, in training and at inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experts import TRAINING, cost, tokens
from benchmarks.registry import BOTH, FORWARD, Build, Case, Provider, Shape, Where
from diffmoe_kernels import ExpertChoiceMoE, Routing, ops
from diffmoe_kernels.modules import Experts, FeedForward
from diffmoe_kernels.modules.linear import Linear

DIFFMOE = "DiffMoE-L-E8"


class ExpertChoice(nn.Module):
    """An `ExpertChoiceMoE` in training, its predictor's loss and its thresholds' average included, or at inference.

    At inference the thresholds are such that the experts' counts sum to the tokens, capacity 1, as near as ties let
    them.
    """

    def __init__(self, shape: Shape, where: Where, dtype: torch.dtype, backend: str, training: bool) -> None:
        super().__init__()
        self.layer = ExpertChoiceMoE(shape.hidden, shape.inner, shape.experts, backend=backend, dtype=dtype)
        self.train(training)
        if not training:
            self.layer.expert_threshold.copy_(self.fitting_thresholds(tokens(shape, where)))

    @torch.no_grad()
    def fitting_thresholds(self, x: Tensor) -> Tensor:
        predictions = self.layer.capacity_predictor(x).float().sigmoid()  # (T, E)
        num_tokens, num_experts = predictions.shape
        thresholds, passed = [], 0
        for expert, column in enumerate(predictions.unbind(1)):
            wanted = round(num_tokens * (expert + 1) / num_experts) - passed  # makes up for the ties before
            values = column.unique()  # ascending
            last = column.sort(descending=True).values[wanted - 1]
            thresholds.append((last + values[(values < last).sum() - 1]) / 2)  # between two values: no ties at it
            passed += int((column > thresholds[-1]).sum())
        assert abs(passed - num_tokens) <= 0.05 * num_tokens, f"{passed} rows for {num_tokens} tokens: no time"
        return torch.stack(thresholds)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return self.layer(x)
        y, aux = self.layer(x, return_aux=True)
        self.layer.update_routing_state(aux)
        return y, aux.loss


class Official(ExpertChoice):
    """The algorithm that the published DiffMoE runs, in PyTorch and over the same weights: expert after expert.

    Each expert takes its best tokens by the softmax over experts: a fixed number in training, at inference as many as
    its predictor says, which the host waits for.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        layer = self.layer
        scores = F.linear(x.float(), layer.router.weight.float()).softmax(-1)  # (T, E)
        predictions = layer.capacity_predictor(x.detach())
        out, chosen, last = torch.zeros_like(x), torch.zeros_like(scores), []
        for expert, score in enumerate(scores.unbind(1)):
            prediction = predictions[:, expert].float().sigmoid()
            if self.training:
                count = len(x) // layer.num_experts
                last.append(prediction.detach().topk(count).values[-1])
            else:
                count = int((prediction > layer.expert_threshold[expert]).sum())
            gates, indices = score.topk(count)
            out.index_add_(0, indices, (self.network(expert, x[indices]) * gates[:, None]).to(x.dtype))
            chosen[indices, expert] = 1
        if not self.training:
            return out
        decay = layer.threshold_decay
        layer.expert_threshold.copy_(layer.expert_threshold * decay + (1 - decay) * torch.stack(last))
        return out, F.binary_cross_entropy_with_logits(predictions.float(), chosen)

    def network(self, expert: int, x: Tensor) -> Tensor:
        own = self.layer.experts
        hidden = F.gelu(F.linear(x, own.up_proj[expert], own.up_proj_bias[expert]), approximate="tanh")
        return F.linear(hidden, own.down_proj[expert], own.down_proj_bias[expert])


class ExactChoice(ExpertChoice):
    """What is right: the layer's choice by the references, then float32."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        layer = self.layer
        scores, predictions = layer.router(x), layer.capacity_predictor(x.detach())
        if not self.training:
            arguments = scores, predictions, layer.expert_threshold
            return in_float32(layer.experts, x, ops.token_drop_predicted(*arguments, backend="reference")[0])
        routing = ops.token_drop(scores, len(x) // layer.num_experts, backend="reference")
        loss = ops.capacity_loss(predictions, routing, backend="reference")
        return in_float32(layer.experts, x, routing), loss


class DenseWithPredictor(nn.Module):
    """A dense network as wide as one expert, and the capacity predictor's two products."""

    def __init__(self, shape: Shape, dtype: torch.dtype, training: bool) -> None:
        super().__init__()
        size = shape.hidden
        self.dense = FeedForward(size, shape.inner * shape.top_k, activation=shape.activation, bias=True, dtype=dtype)
        experts = TRAINING[DIFFMOE].experts
        self.predictor = nn.Sequential(Linear(size, size, dtype=dtype), nn.SiLU(), Linear(size, experts, dtype=dtype))
        self.train(training)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        predictions = self.predictor(x.detach())
        return self.dense(x), predictions.float().mean() if self.training else predictions


def in_float32(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    weights = {name: parameter.float() for name, parameter in experts.named_parameters()}
    names = {experts.up_name: "up_proj", f"{experts.up_name}_bias": "up_bias", "down_proj_bias": "down_bias"}
    weights = {names.get(name, name): weight for name, weight in weights.items()}
    return ops.experts(x.float(), routing, **weights, activation=experts.activation, backend="reference")


def expert_choice_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """The experts, and the products of the router (D E) and the predictor (D D + D E).

    Backward leaves out the predictor's gradient by its input, which nothing asks for.
    """
    flops, least_bytes = cost(shape, direction, size)
    width = TRAINING[DIFFMOE].experts
    router, first, second = (2 * shape.tokens * shape.hidden * n for n in (width, shape.hidden, width))
    weights = shape.hidden * (shape.hidden + 2 * width) * size
    both = direction == BOTH
    return flops + (3 * router + 2 * first + 3 * second if both else router + first + second), least_bytes + weights * (
        2 if both else 1
    )


def expert_choice_providers(where: Where, training: bool) -> tuple[dict[str, Provider], Build]:
    def of(kind: type[ExpertChoice], backend: str) -> Build:
        return lambda shape, where, dtype: kind(shape, where, dtype, backend, training)

    def dense(shape: Shape, where: Where, dtype: torch.dtype) -> nn.Module:
        return DenseWithPredictor(shape, dtype, training)

    return {
        "dense + predictor": Provider(dense, compiled=where.compiler is not None, ceiling=True),
        "triton": Provider(of(ExpertChoice, "triton"), "triton"),
        "torch": Provider(of(ExpertChoice, "torch"), "torch"),
        "loop": Provider(of(Official, "reference"), captured=False),
        "loop, compiled": Provider(of(Official, "reference"), captured=False, compiled=True, fullgraph=False),
    }, of(ExactChoice, "reference")


def cases(where: Where) -> list[Case]:
    found = []
    for direction in (BOTH, FORWARD):
        providers, right = expert_choice_providers(where, training=direction == BOTH)
        shape = TRAINING[DIFFMOE]
        found.append(
            Case("expert-choice layer", DIFFMOE, direction, shape, providers, tokens, right, expert_choice_cost)
        )
    return found
