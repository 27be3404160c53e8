"""Which experts a model's tokens go to while it samples: counted on the device, read once at the end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from diffmoe_kernels import ExpertChoiceMoE, MoE, Routing

CONDITIONAL, UNCONDITIONAL = 0, 1  # the halves of guidance


@dataclass(frozen=True, eq=False)
class ExpertUsage:
    """Counts over all sampled images. L MoE layers, C classes, S times of sampling, E experts.

    A row is one token at one expert. Guidance runs the model a second time without a class: that half counts in
    ``rows_by_time[:, 1]`` and ``tokens_by_time[:, 1]`` alone.

    Attributes:
        blocks: (L,) int64, the blocks that the layers stand in.
        classes: (C,) int64, the classes that were sampled, rising.
        times: (S,) float64, times at which the sampler called the model, in its order; calls at one time are added.
        rows_by_class: (L, C, E) int64.
        tokens_by_class: (L, C) int64, tokens that the layer saw, routed or not.
        rows_by_time: (L, 2, S, E) int64, conditional and unconditional half.
        tokens_by_time: (L, 2, S) int64.
    """

    blocks: np.ndarray
    classes: np.ndarray
    times: np.ndarray
    rows_by_class: np.ndarray
    tokens_by_class: np.ndarray
    rows_by_time: np.ndarray
    tokens_by_time: np.ndarray

    @property
    def num_experts(self) -> int:
        return self.rows_by_class.shape[-1]

    @property
    def load(self) -> np.ndarray:
        """(L, E) float64: each expert's share of its layer's rows; NaN in a layer without any."""
        return shares(self.rows_by_class.sum(1))

    @property
    def capacity_by_class(self) -> np.ndarray:
        """(L, C) float64: experts per token."""
        return ratio(self.rows_by_class.sum(-1), self.tokens_by_class)

    @property
    def capacity_by_time(self) -> np.ndarray:
        """(L, 2, S) float64: experts per token, conditional and unconditional; NaN where no such half was computed."""
        return ratio(self.rows_by_time.sum(-1), self.tokens_by_time)


@dataclass(frozen=True)
class LayerLoad:
    """How evenly a layer's rows spread over its experts; NaN where it has no rows.

    block: index of the layer's block.
    cv: coefficient of variation of the experts' loads, standard deviation over mean; 0 is even.
    max_over_mean: load of the busiest expert over the mean.
    largest_share, smallest_share: of the layer's rows, that the busiest and the least busy expert computes.
    dead_experts: experts that no token went to.
    experts_per_token: rows per token.
    """

    block: int
    cv: float
    max_over_mean: float
    largest_share: float
    smallest_share: float
    dead_experts: int
    experts_per_token: float


def layer_loads(usage: ExpertUsage) -> list[LayerLoad]:
    """A record per MoE layer, of the conditional half."""
    return [
        LayerLoad(
            block=int(block),
            cv=float(share.std() / share.mean()),
            max_over_mean=float(share.max() / share.mean()),
            largest_share=float(share.max()),
            smallest_share=float(share.min()),
            dead_experts=int((rows.sum(0) == 0).sum()),
            experts_per_token=float(rows.sum() / tokens.sum()),
        )
        for block, share, rows, tokens in zip(
            usage.blocks, usage.load, usage.rows_by_class, usage.tokens_by_class, strict=True
        )
    ]


def shares(rows: np.ndarray) -> np.ndarray:
    """(..., E) counts -> (..., E) float64 shares of their sum, NaN where that is 0."""
    return ratio(rows, rows.sum(-1, keepdims=True))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def group_classes(usage: ExpertUsage, most: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """At most `most` groups of neighbouring classes, as even in number as can be; each class by itself if they fit.

    Returns:
        names: a label, or the first and the last of a group.
        rows: (L, G, E) int64, added over the group.
        tokens: (L, G) int64.
    """
    groups = np.array_split(np.arange(len(usage.classes)), min(most, len(usage.classes)))
    ends = [(usage.classes[group[0]], usage.classes[group[-1]]) for group in groups]
    names = [str(first) if first == last else f"{first}–{last}" for first, last in ends]
    starts = [group[0] for group in groups]
    return names, np.add.reduceat(usage.rows_by_class, starts, 1), np.add.reduceat(usage.tokens_by_class, starts, 1)


def rows_per_sample(routing: Routing, num_samples: int) -> Tensor:
    """(num_samples, E) int64: how many tokens of each sample go to each expert.

    Args:
        routing: of a batch's tokens, sample after sample; rows past the true count are left out.
        num_samples: B, which divides the tokens.
    """
    tokens_per_sample, num_experts = routing.num_tokens // num_samples, routing.num_experts
    samples = routing.token_indices.long() // tokens_per_sample
    # Rows past the true count have expert E: a column more, which is cut off.
    places = samples * (num_experts + 1) + routing.row_experts
    counts = places.new_zeros(num_samples * (num_experts + 1)).scatter_add_(0, places, torch.ones_like(places))
    return counts.view(num_samples, num_experts + 1)[:, :num_experts]


class UsageRecorder:
    """Counts the routing of every MoE layer while a sampler of fixed times calls a model.

    Used as ``with UsageRecorder(model) as recorder:``, with `start_batch` before each batch of images and `usage` at
    the end. It hooks the model and its experts, whose inputs it reads; nothing waits for the device before `usage`.

    Args:
        model: one of the zoo's, in evaluation mode, uncompiled.

    Raises:
        ValueError: a model without experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {
            index: block.mlp for index, block in enumerate(model.blocks) if isinstance(block.mlp, MoE | ExpertChoiceMoE)
        }
        if not self.layers:
            raise ValueError(
                f"model: expected one with MoE layers, got a dense {type(model).__name__}: there are no experts to "
                "analyse; pass a checkpoint of DSMoE, DiffMoE, JiTMoE, TC-DiT or EC-DiT"
            )
        self.device = next(model.parameters()).device
        self.num_experts = next(iter(self.layers.values())).experts.down_proj.shape[0]
        self.tokens_per_sample = [0] * len(self.layers)
        # The last class is the null label.
        self._rows_by_class = self._zeros(len(self.layers), model.num_classes + 1, self.num_experts)
        self._samples_by_class = self._zeros(model.num_classes + 1)
        self._rows_by_call: list[Tensor] = []  # each (L, 2, E)
        self._samples_by_call: list[Tensor] = []  # each (2,)
        self._times: list[list[Tensor]] = []  # by batch and call
        self._batch_size = 0

    def __enter__(self) -> UsageRecorder:
        self._handles = [self.model.register_forward_pre_hook(self._start_call)]
        for position, layer in enumerate(self.layers.values()):
            self._handles.append(layer.experts.register_forward_pre_hook(partial(self._count, position)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start_batch(self, num_images: int) -> None:
        """Tells that the model's next calls are for a new batch of so many images, from the first time on.

        A call's first `num_images` samples count, and as many of the null label behind them, if there are: not those
        that the sampler adds to fill a batch.
        """
        self._batch_size = num_images
        self._times.append([])

    def usage(self) -> ExpertUsage:
        """All counts so far, on the host.

        Raises:
            ValueError: nothing was sampled, or the batches were not sampled at the same times.
        """
        if not self._rows_by_call:
            raise ValueError("recorder: expected calls of the model after start_batch, got none")
        times = [torch.stack(batch).double().tolist() for batch in self._times]
        if any(batch != times[0] for batch in times):
            raise ValueError("times: expected the same in every batch, got others: use a sampler of fixed steps")
        # Heun ends a step where the next begins, and guidance may call twice: what happens at one time is added.
        unique, first, place = np.unique(times[0], return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.argsort(order)[place]
        rows = torch.stack(self._rows_by_call, 2).cpu().numpy()  # (L, 2, calls, E)
        samples = torch.stack(self._samples_by_call, 1).cpu().numpy()  # (2, calls)
        rows_by_time = np.zeros((*rows.shape[:2], len(unique), self.num_experts), np.int64)
        samples_by_time = np.zeros((2, len(unique)), np.int64)
        np.add.at(rows_by_time, (slice(None), slice(None), place), rows)
        np.add.at(samples_by_time, (slice(None), place), samples)
        samples_by_class = self._samples_by_class.cpu().numpy()[:-1]
        (classes,) = samples_by_class.nonzero()
        tokens = np.array(self.tokens_per_sample)
        return ExpertUsage(
            blocks=np.array(list(self.layers)),
            classes=classes,
            times=unique[order],
            rows_by_class=self._rows_by_class.cpu().numpy()[:, classes],
            tokens_by_class=tokens[:, None] * samples_by_class[classes],
            rows_by_time=rows_by_time,
            tokens_by_time=tokens[:, None, None] * samples_by_time,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _start_call(self, model: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        _, t, labels = args
        batch = self._times[-1]
        self._call = len(batch)
        batch.append(t[0])
        if self._call == len(self._rows_by_call):
            self._rows_by_call.append(self._zeros(len(self.layers), 2, self.num_experts))
            self._samples_by_call.append(self._zeros(2))
        is_null = labels == model.num_classes
        place = torch.arange(len(labels), device=labels.device)
        counts = (place < self._batch_size) | (is_null & (place < 2 * self._batch_size))
        self._labels, self._halves, self._counts = labels, is_null.long(), counts.long()  # (B,)
        self._samples_by_class.index_add_(0, labels, self._counts)
        self._samples_by_call[self._call].index_add_(0, self._halves, self._counts)

    def _count(self, layer: int, experts: nn.Module, args: tuple[Tensor, Routing, Tensor | None]) -> None:
        routing = args[1]
        self.tokens_per_sample[layer] = routing.num_tokens // len(self._labels)
        rows = rows_per_sample(routing, len(self._labels)) * self._counts.unsqueeze(1)  # (B, E)
        self._rows_by_class[layer].index_add_(0, self._labels, rows)
        self._rows_by_call[self._call][layer].index_add_(0, self._halves, rows)
