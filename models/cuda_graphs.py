"""What the host launches once and a GPU then repeats by itself: training steps and a sampler's calls of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Recording:
    """A graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Any
    gradients: list[Tensor | None]


class Captured:
    """A computation from CUDA graphs: the host launches one thing a call where it launched hundreds or thousands.

    The first calls with inputs of some shapes run as they are, on the stream of the capture: they compile what is
    compiled at a first call, and make what is kept. The graph then holds the kernels of one call, with the addresses of
    its inputs and results, so that inputs are copied to where they were, and what a call returns, as the gradients, is
    gone with the next call. Random numbers go on as they would without a graph.

    Args:
        compute: of tensors; it may add to the parameters' gradients, and must neither wait for the GPU nor ask it what
            to launch. What else it reads must stay where it is in memory.
        device: that of all it computes.
        parameters: those that it computes gradients of; they have none when this is called.

    Raises:
        RuntimeError: gradients of an earlier call are left.
        NotImplementedError: the computation can't be captured.
    """

    WARM_UP = 3  # calls

    def __init__(self, compute: Callable[..., Any], device: torch.device, parameters: Sequence[Tensor] = ()) -> None:
        self.compute, self.parameters = compute, parameters
        # One for all graphs, none of which runs beside another.
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.calls: Counter[Any] = Counter()
        self.recordings: dict[Any, Recording] = {}

    @staticmethod
    def check_device(device: torch.device) -> None:
        """Raises ValueError where there are no graphs."""
        if device.type != "cuda":
            raise ValueError(f"cuda_graph needs a GPU, got device {device}: leave --cuda-graph out")

    def __call__(self, *inputs: Tensor) -> Any:
        if any(parameter.grad is not None for parameter in self.parameters):
            raise RuntimeError("gradients of an earlier step are left, which a graph does not add to: set them to None")
        key = tuple((one.shape, one.dtype) for one in inputs)
        self.calls[key] += 1
        if self.calls[key] <= self.WARM_UP:
            return self._warm_up(*inputs)
        if key not in self.recordings:
            self.recordings[key] = self._capture(*inputs)
        return self._replay(self.recordings[key], *inputs)

    def _warm_up(self, *inputs: Tensor) -> Any:
        """Where it will be captured: autograd adds a gradient on the stream that first made one."""
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            results = self.compute(*inputs)
        outer.wait_stream(self.stream)
        return results

    def _capture(self, *inputs: Tensor) -> Recording:
        kept, graph = [one.clone() for one in inputs], torch.cuda.CUDAGraph()
        causes: list[Exception] = []
        try:
            # The threads that load data may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                try:
                    results = self.compute(*kept)
                except Exception as error:  # which the capture's end would hide
                    causes.append(error)
                    raise
        except Exception as error:
            cause = (causes or [error])[0]
            raise NotImplementedError(f"this does not fit in a CUDA graph, leave --cuda-graph out: {cause}") from cause
        results = tree_map_only(Tensor, Tensor.detach, results)  # else autograd's graph would be kept
        return Recording(graph, kept, results, [parameter.grad for parameter in self.parameters])

    def _replay(self, recording: Recording, *inputs: Tensor) -> Any:
        for kept, new in zip(recording.inputs, inputs, strict=True):
            kept.copy_(new)
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.results


class CapturedModel(nn.Module):
    """A model in evaluation, in a wrapper that calls it from CUDA graphs, one for each shape of its inputs.

    It is captured anew where its weights lie elsewhere than before, or autocast or the precision of products are
    others. Each call returns a tensor of its own.

    Raises:
        ValueError: the model is in training mode, or not on a GPU.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if module.training:
            raise ValueError("model is in training mode: call model.eval() before its calls are captured")
        self.device = next(module.parameters()).device
        Captured.check_device(self.device)
        self.module, self.captured, self.circumstances = module, None, None
        self.kept = [held for part in module.modules() for held in (part._parameters, part._buffers) if held]
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        addresses = [one.data_ptr() for held in self.kept for one in held.values() if one is not None]
        circumstances = autocast, torch.get_float32_matmul_precision(), addresses
        if circumstances != self.circumstances:
            self.circumstances, self.captured = circumstances, Captured(self._compute, self.device)
        return self.captured(*inputs).clone()

    @torch.no_grad()
    def _compute(self, *inputs: Tensor) -> Tensor:
        kind = self.device.type
        # What autocast keeps of weights is gone when it ends, and a graph would go on to read it.
        cast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        with torch.autocast(kind, cache_enabled=False, **cast):
            return self.module(*inputs)
