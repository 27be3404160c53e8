"""The gradients of a batch: forward and backward, launched by the host or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from models.objectives import Objective
from models.precision import Precision, float32_products
from models.training.processes import Processes


@dataclass(frozen=True)
class Gradients:
    """What a training step computes of a batch, in parts that have a forward and backward each.

    Calling it with images, labels, times and noise adds to the parameters' gradients, and returns the means of loss and
    error, (2,) float32, and each part's record of router statistics.
    """

    model: nn.Module
    objective: Objective
    processes: Processes
    precision: Precision
    parts: int = 1

    def __call__(self, *batch: Tensor) -> tuple[Tensor, list[Any]]:
        images, device = batch[0], batch[0].device
        totals, auxes = torch.zeros(2, device=device), []
        parts = zip(*(tensor.tensor_split(self.parts) for tensor in batch), strict=True)
        with float32_products(self.precision):
            for part, (x, labels, t, noise) in enumerate(parts, 1):
                share = len(x) / len(images)
                with self.processes.combine(self.model, last=part == self.parts):
                    with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                        result = self.objective.loss(self.model, x, labels, t=t, noise=noise)
                    (result.loss * share).backward()
                totals += share * torch.stack([result.loss, result.mse.mean()]).detach()
                auxes.append(result.aux)
        return totals, auxes


class Captured:
    """Gradients from a CUDA graph: the host launches one thing a step where it launched thousands.

    The first calls run as they are, on the stream of the capture: they compile what is compiled at a first call, and
    make what is kept. The graph then holds the kernels of one step, with the addresses of its inputs and results, so
    that inputs are copied to where they were, and what a call returns, as the gradients, is gone with the next call.
    Random numbers go on as they would without a graph.

    Args:
        compute: of tensors; it adds to the parameters' gradients, and must neither wait for the GPU nor ask it what
            to launch.
        parameters: those with gradients; they have none when this is called.

    Raises:
        ValueError: inputs of another shape or dtype than those of the capture.
        RuntimeError: gradients of an earlier step are left.
        NotImplementedError: the computation can't be captured.
    """

    WARM_UP = 3  # calls

    def __init__(self, compute: Callable[..., Any], parameters: Sequence[Tensor]) -> None:
        self.compute, self.parameters = compute, parameters
        self.stream = torch.cuda.Stream(parameters[0].device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def check_device(device: torch.device) -> None:
        """Raises ValueError where there are no graphs."""
        if device.type != "cuda":
            raise ValueError(f"cuda_graph needs a GPU, got device {device}: leave --cuda-graph out")

    def __call__(self, *inputs: Tensor) -> Any:
        if any(parameter.grad is not None for parameter in self.parameters):
            raise RuntimeError("gradients of an earlier step are left, which a graph does not add to: set them to None")
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._warm_up(*inputs)
        if self.graph is None:
            self._capture(*inputs)
        self._replay(*inputs)
        return self.results

    def _warm_up(self, *inputs: Tensor) -> Any:
        """Where it will be captured: autograd adds a gradient on the stream that first made one."""
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            results = self.compute(*inputs)
        outer.wait_stream(self.stream)
        return results

    def _capture(self, *inputs: Tensor) -> None:
        self.inputs = [one.clone() for one in inputs]
        self.graph = torch.cuda.CUDAGraph()
        causes: list[Exception] = []
        try:
            # The threads that load data may use the GPU meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                try:
                    results = self.compute(*self.inputs)
                except Exception as error:  # which the capture's end would hide
                    causes.append(error)
                    raise
        except Exception as error:
            cause = (causes or [error])[0]
            raise NotImplementedError(f"a training step does not fit in a CUDA graph here: {cause}") from cause
        self.results = tree_map_only(Tensor, Tensor.detach, results)  # else autograd's graph would be kept
        self.gradients = [parameter.grad for parameter in self.parameters]

    def _replay(self, *inputs: Tensor) -> None:
        for number, (kept, new) in enumerate(zip(self.inputs, inputs, strict=True)):
            if (kept.shape, kept.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"input {number} must be {tuple(kept.shape)} {kept.dtype} as it was captured, "
                    f"got {tuple(new.shape)} {new.dtype}"
                )
            kept.copy_(new)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
