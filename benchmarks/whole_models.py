"""Whole models: a step of training and one of sampling (`benchmarks.steps`) at batch 64, 256, the largest that fits.

CUDA events stand around a few steps in a row, as users launch them from Python, their checks of labels and times
included. In training no step waits for the GPU, so the host may run ahead of it; in sampling each waits for the checks
of its labels. "captured" replays forward and backward, or the model's call in sampling, from a CUDA graph, as
`models.train --cuda-graph` and `models.sample --cuda-graph` do; PyTorch does not tell how much memory a replay takes.

Compiled is block by block: blocks of one kind share a compilation, which takes seconds; that of a whole model takes
minutes. "one graph" is the dense model compiled as a whole.

Before it is timed a step is checked: the images' errors (or the samples) and each parameter's gradient may be off from
those of the reference backend in float32 little more than those of the reference backend in bfloat16 are.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, timing
from benchmarks.experts import gather_sum
from benchmarks.registry import BOTH, FORWARD, Build, Case, Provider, Where, normal
from benchmarks.steps import Sampling, Training
from diffmoe_kernels import Routing
from diffmoe_kernels.modules import Experts
from diffmoe_kernels.testing import relative_error
from models import CONFIGS, DiffMoEConfig, DiT, count_parameters, create_model
from models.flops import model_flops

MODELS = "DiT-L/2", "DSMoE-L-E16", "DSMoE-L-E48", "DiffMoE-L-E8", "DSMoE-3B-E16", "JiT-L/16", "JiTMoE-L/16-E16"
BATCHES = {"training step": (64, 256, None), "sampling step": (64, None)}  # None: the largest that fits
RUNS = {BOTH: Training, FORWARD: Sampling}
CHECKED = 64  # images that are checked where the batch is looked for or each image depends on all others
AT_ONCE = 16  # images that the reference takes, which keeps far more for its backward
MOST = 2048  # images that are tried
USABLE = 0.95  # of the memory; the rest is lost between pieces
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of errors, beyond three times the reference's own


@dataclass(frozen=True)
class ModelShape:
    """A model, and how many images; None for the largest power of two that fits."""

    model: str
    images: int | None

    @property
    def of_ceiling(self) -> ModelShape:
        return self

    def small(self) -> ModelShape:
        """What stands for it on a CPU: its family's size for the digits."""
        return ModelShape(f"{self.model.partition('-')[0]}-digits", 8)

    def dimensions(self) -> dict[str, Any]:
        total, activated = parameters(self.model)
        return {"model": self.model, "images": self.images, "parameters": total, "activated_parameters": activated}

    @property
    def mixes(self) -> bool:
        """Whether an image depends on the others of its batch: experts choose among all their tokens."""
        return isinstance(CONFIGS[self.model], DiffMoEConfig)


@functools.cache
def parameters(model: str) -> tuple[int, int]:
    """All, and those that one token uses."""
    with torch.device("meta"):
        return count_parameters(create_model(model))


def cost(shape: ModelShape, direction: str, size: int) -> tuple[int, int]:
    """Products by `model_flops`, those of guided sampling twice. Least bytes: of the parameters alone.

    Each is read once; in training, where it is float32, its gradient is also written, then AdamW and the average read
    and write it, two moments and the average, and read the gradient: 11 times in all.
    """
    config, count, (total, _) = CONFIGS[shape.model], shape.images or 0, parameters(shape.model)
    if direction == BOTH:
        return model_flops(config, count, training=True), 11 * 4 * total
    return 2 * model_flops(config, count), size * total


def images(shape: ModelShape, where: Where) -> Tensor:
    """(images, C, H, W): to train on, or the noise to sample from."""
    config = CONFIGS[shape.model]
    return normal(where, shape.images, config.in_channels, config.input_size, config.input_size)


def build(backend: str, direction: str, experts: type[Experts] = Experts) -> Build:
    """A model with float32 weights that no zero hides and no label is dropped from.

    Args:
        backend, direction: of the model, and what it is for.
        experts: another class for the model's.
    """

    def built(shape: ModelShape, where: Where, dtype: torch.dtype) -> DiT:
        model = create_model(shape.model, backend=backend)
        model.y_embedder.dropout_prob = 0.0  # a compiler draws other random numbers
        awaken(model)
        if direction == FORWARD and shape.mixes:
            set_thresholds(model, images(shape, where))
        for part in model.modules():
            if isinstance(part, Experts):
                part.__class__ = experts
        return model

    return built


@torch.no_grad()
def awaken(model: DiT) -> None:
    """Replaces the zeros of adaLN-Zero, behind which a fresh model computes nothing."""
    for module in (*model.blocks, model.final_layer):
        nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
        nn.init.normal_(module.adaLN_modulation[1].bias, std=0.3)
    nn.init.normal_(model.final_layer.linear.weight, std=model.config.hidden_size**-0.5)


@torch.no_grad()
def set_thresholds(model: DiT, noise: Tensor) -> None:
    """Those that let through as many of the first sampling step's tokens as experts take in training."""
    labels = torch.arange(len(noise), device=noise.device) % model.num_classes
    _, aux = model.train()(noise, torch.zeros(len(noise), device=noise.device), labels, return_aux=True)
    for block, layer in zip(model.blocks, aux.layers, strict=True):
        if layer is not None:
            block.mlp.expert_threshold.copy_(layer.capacity_quantile)


class GroupedMM(Experts):
    """What a skilled user of plain PyTorch writes for SwiGLU: gather, `grouped_mm` twice, gather again and sum."""

    def forward(self, x: Tensor, routing: Routing, residual: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # which `grouped_mm` does not know
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows, offsets = x.index_select(0, routing.token_indices), routing.group_offsets  # (R, D)
        gate, up = F.grouped_mm(rows, self.gate_up_proj.to(x.dtype).mT, offs=offsets).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down_proj.to(x.dtype).mT, offs=offsets)
        out = gather_sum(rows, routing.gates, routing.token_rows, len(rows) // len(x))
        return out if residual is None else out + residual


def blocks(model: nn.Module) -> nn.ModuleList:
    return model.blocks


def providers(model: str, batch: int | None, direction: str, where: Where, repeated: bool) -> dict[str, Provider]:
    """Of one model and batch; ``repeated`` where on this machine another case does the same."""
    reason = "small, it is the same as another batch or model of its family" if repeated else None
    how_timed = {"captured": False, "in_a_row": True, "needs": lambda where: reason}
    common = {"masters": where.dtype != torch.float32, **how_timed}
    found = {}
    for backend in ("triton", "torch"):
        eager = Provider(build(backend, direction), backend, **common)
        compiled = replace(eager, compiled=True, regions=blocks)
        found |= {f"{backend}, compiled": compiled, backend: eager}
        if batch is not None and (direction == BOTH or backend == "triton"):
            found[f"{backend}, compiled, captured"] = replace(compiled, replays=True)
    if model.startswith(("DSMoE", "JiTMoE")):
        plain = Provider(build("torch", direction, GroupedMM), compiled=True, regions=blocks, **common)
        found["grouped_mm, compiled"] = plain
    if not getattr(CONFIGS[model], "num_experts", 0):
        found["torch, one graph"] = Provider(build("torch", direction), "torch", compiled=True, **common)
    return found


def cases(where: Where) -> list[Case]:
    found, seen = [], set()
    for op, batches in BATCHES.items():
        direction = BOTH if op == "training step" else FORWARD
        for batch in batches:
            for model in MODELS:
                if model == "DSMoE-3B-E16" and batch == 256:
                    continue  # does not fit
                name = f"{model}, {'largest batch' if batch is None else f'batch {batch}'}"
                shape = ModelShape(model, batch)
                small = op, where.resize(shape)
                who = providers(model, batch, direction, where, repeated=small in seen)
                seen.add(small)
                reference = build("reference", direction)
                found.append(Case(op, name, direction, shape, who, images, reference, cost, prepare=prepare))
    return found


def prepare(case: Case, provider: Provider, where: Where) -> tuple[list[Callable[[], object]], dict[str, Any]]:
    """As `measure.prepare` does.

    Raises:
        AssertionError: a result is wrong.
        SkipTest: so many images do not fit.
    """
    shape, on_gpu = where.resize(case.shape), where.device == "cuda"
    gc.collect()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    count = shape.images or CHECKED
    checked = replace(shape, images=min(count, CHECKED) if shape.mixes else count)
    x = images(checked, where)
    try:
        exact, rounding = right(case, checked, x, where)
        run = RUNS[case.direction](provider.module(checked, where), where.dtype)
        agree(run.outcome(x, len(x)), exact, rounding, where.dtype)
        del exact
        run.begin(captured=provider.replays)

        @functools.cache
        def memory(count: int) -> tuple[int, int]:
            """Bytes that are allocated between the steps of so many images, and at most within one."""
            if count != checked.images:
                torch._dynamo.reset()  # each is compiled for its own sizes
            run.model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            x = images(replace(shape, images=count), where)
            steps = [run.step_on(one) for one in measure.in_other_orders(x)]  # as they are timed
            for _ in range(run.first_steps):  # they compile, capture, make the optimizer's moments
                steps[0]()
            between = torch.cuda.memory_allocated()
            return between, between + measure.peak_bytes(steps[0])

        measured = {}
        if on_gpu:
            if shape.images is None:
                count = largest_batch(memory, run.grows_to(), CHECKED, room())
            between, most = memory(count)
            if not provider.replays:
                measured = {"peak_mib": measure.mib(most - between), "allocated_mib": measure.mib(most - held)}
        x = images(replace(shape, images=count), where)
        flops, least_bytes = cost(replace(shape, images=count), case.direction, where.dtype.itemsize)
        measured |= {"images": count, "flops": flops, "least_bytes": least_bytes, **run.apart(x)}
        return [run.step_on(one) for one in measure.in_other_orders(x)], measured
    except RuntimeError as error:
        if provider.replays:  # by its capture, maybe
            timing.BROKEN.append(error)
        if not out_of_memory(error):
            raise
        raise SkipTest(f"{shape.images or CHECKED} images do not fit in the GPU's memory") from None


def right(case: Case, shape: ModelShape, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the reference computes in float32, and by how much what it computes in the machine's dtype is off."""
    at_once = len(x) if shape.mixes else min(len(x), AT_ONCE)
    found = []
    for dtype in (torch.float32, where.dtype):
        torch.manual_seed(0)
        with torch.device(where.device):
            model = case.reference(shape, where, torch.float32)
        found.append(RUNS[case.direction](model, dtype).outcome(x, at_once))
    exact, rounded = found
    return exact, {name: relative_error(rounded[name], one) for name, one in exact.items()}


def agree(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], rounding: Mapping[str, float], dtype: torch.dtype
) -> None:
    """Raises AssertionError where a result is off by more than three times what the reference rounds, and a little."""
    for name, one in exact.items():
        error = relative_error(found[name], one)
        fine = error <= 3 * rounding[name] + LIMITS[dtype]
        assert fine, f"{name} is wrong by {error:.2e}, the reference by {rounding[name]:.2e}: no time"


def largest_batch(memory: Callable[[int], tuple[int, int]], grows_to: int, first: int, room: int) -> int:
    """The most images, up to `MOST` and a power of two times ``first``, whose step fits.

    Memory beyond what is there whatever their number grows in proportion to the images. Gradients are counted to the
    former whole, though they may not all be there when memory is fullest: so the estimate allows too many rather than
    too few. What it allows is tried, then half of that.

    Args:
        memory: images -> bytes between steps, and at most within one; raises torch.OutOfMemoryError.
        grows_to: bytes that each step comes to hold whatever the images' number.
        room: bytes that there are.

    Raises:
        torch.OutOfMemoryError: the first does not fit.
    """
    between, most = memory(first)
    fixed, count = between + grows_to, first
    while 2 * count <= MOST and fixed + (most - fixed) * 2 * count / first <= room:
        count *= 2
    while count > first:
        try:
            memory(count)
            break
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            count //= 2
    return count


def out_of_memory(error: RuntimeError) -> bool:
    """PyTorch's own error, or the driver's, which loads kernels beside what PyTorch's allocator has taken."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def room() -> int:
    """Bytes of the GPU that this process can use."""
    free, _ = torch.cuda.mem_get_info()
    return int(USABLE * (free + torch.cuda.memory_reserved()))
