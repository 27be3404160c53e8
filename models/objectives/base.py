"""What all objectives share: the training loss around a model, guidance in sampling, and the checks of both."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffmoe_kernels.checks import at_least_float32
from models.data.splits import check_labels

# A CPU computes a few rows, a single image or the odd end of a vector by other routines than the rest, with another
# rounding: in batches of whole 16 a sample has the same bits however many are drawn at a time. Established by trial
# (tests/models/test_same_bits.py), for float32 on x86; no library promises it.
CPU_BATCH_MULTIPLE = 16

# (z (N, C, H, W), time, guided) -> the model's output for the labels, and for the null labels if guided, else None.
Predict = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class TrainingLoss:
    """One evaluation of the training loss, float32.

    loss: () mean over the samples plus the model's own auxiliary losses, to call `backward` on.
    mse: (N,) squared error of each sample's prediction, averaged over channels and pixels.
    aux: the model's record of router statistics, or None where it has none.
    """

    loss: Tensor
    mse: Tensor
    aux: Any | None


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What a model is trained to predict, and how to sample from it. Holds settings, no parameters and no state.

    Besides being called, a model needs `num_classes` and `null_label` (the label of "no class", None without one).
    """

    # Samplers and how many steps each takes by default; None for one that chooses its steps. The first is the default.
    methods: ClassVar[dict[str, int | None]]

    @abstractmethod
    def draw_times(self, count: int, device: torch.device) -> Tensor:
        """(count,) training times from torch's global generator."""

    @abstractmethod
    def check_times(self, t: Tensor) -> None:
        """Refuse times (N,) of another type or range than `draw_times` gives."""

    @abstractmethod
    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The model's input: data and standard normal noise (N, C, H, W) mixed as at times t (N,), float32."""

    @abstractmethod
    def losses(self, prediction: Tensor, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) loss and (N,) squared error of the model's output (N, at least C, H, W) at z and t (N,), float32."""

    @abstractmethod
    def integrate(
        self,
        predict: Predict,
        noise: Tensor,
        *,
        steps: int | None,
        method: str,
        cfg_scale: float,
        step_noise: Callable[[], Tensor],
    ) -> Tensor:
        """From noise to samples, both (N, C, H, W) float32: `sample` after its checks."""

    def check_model(self, model: nn.Module) -> None:  # noqa: B027 most take any
        """Refuse a model that can't be trained with this objective."""

    def loss(
        self, model: nn.Module, x: Tensor, labels: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> TrainingLoss:
        """The loss of a batch, with times and noise drawn from torch's global generator where not given.

        Args:
            model: called as `model(z, t, labels, return_aux=True)`, returns (N, at least C, H, W) and its aux record;
                it may be in a wrapper, such as DistributedDataParallel.
            x: (N, C, H, W) images.
            labels: (N,) int64 in [0, model.num_classes); the model drops labels itself in training mode.
            t: (N,) times as `draw_times` gives them, the default.
            noise: (N, C, H, W); standard normal by default.

        Raises:
            TypeError, ValueError: an empty batch, labels or times out of range (on a GPU, which is not waited for, an
                assertion of the device fails instead), shapes that do not fit.
        """
        _check_batch("x", x)
        self.check_model(unwrapped(model))
        check_labels(labels, unwrapped(model).num_classes, wait=False)
        _check_length("labels", labels, x)
        if t is None:
            t = self.draw_times(len(x), x.device)
        else:
            if not isinstance(t, Tensor):
                raise TypeError(f"t must be a tensor of times, got {type(t).__name__}; use torch.tensor(...)")
            _check_length("t", t, x)
            self.check_times(t)
        if noise is None:
            noise = torch.randn_like(x)
        elif noise.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")

        # In bfloat16 a time of 0.9993 would be 1 and the noise gone.
        data, noise = at_least_float32(x), at_least_float32(noise)
        z = self.corrupt(data, noise, t)
        prediction, aux = model(z.to(x.dtype), t, labels, return_aux=True)
        losses, mse = self.losses(at_least_float32(prediction), data, noise, z, t)
        aux_loss = getattr(aux, "loss", None)
        loss = losses.mean() if aux_loss is None else losses.mean() + aux_loss.float()
        return TrainingLoss(loss, mse, aux)

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        noise: Tensor,
        labels: Tensor,
        *,
        steps: int | None = None,
        method: str | None = None,
        cfg_scale: float = 1.0,
        null_labels: Tensor | None = None,
        step_noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Samples that start from `noise`; the result is a function of the arguments alone.

        Args:
            model: in evaluation mode; it may be in a wrapper, such as AveragedModel.
            noise: (N, C, H, W) standard normal.
            labels: (N,) int64 in [0, model.num_classes), or `model.null_label` to sample without a class.
            steps: of the sampler; the method's own default where None.
            method: one of `methods`, the first where None.
            cfg_scale: guidance s of u + s * (c - u); 1 is plain conditional sampling, and then the model runs on N
                samples, else on 2N (or twice on N, where `model.mixes_samples`).
            null_labels: (N,) labels of the unconditional half; `model.null_label` by default.
            step_noise: called at each step of a method that adds noise, returns (N, C, H, W) standard normal; by
                default from torch's global generator of the noise's device.

        Returns:
            (N, C, H, W) float32.

        Raises:
            TypeError, ValueError: an empty batch, labels out of range, guidance or the null label asked of a model
                that has none, a model in training mode, an unknown method, steps that the method can't take.
        """
        _check_batch("noise", noise)
        bare = unwrapped(model)
        self.check_model(bare)
        method, steps = self.pick_method(method, steps)
        if model.training:
            raise ValueError("model is in training mode, where it drops labels: call model.eval() before sampling")
        _check_sampling_labels("labels", labels, noise, bare)
        if not math.isfinite(cfg_scale):
            raise ValueError(f"cfg_scale: expected a finite number, got {cfg_scale}")
        if cfg_scale != 1.0:
            if null_labels is None:
                null_labels = _null_labels(bare, noise)
            else:
                _check_sampling_labels("null_labels", null_labels, noise, bare)
        start = noise.float()

        mixes = getattr(bare, "mixes_samples", False)
        multiple = 1 if mixes or start.device.type != "cpu" else CPU_BATCH_MULTIPLE

        def run(z: Tensor, time: float, labels: Tensor) -> Tensor:
            count, added = len(z), -len(z) % multiple
            z, labels = _repeat_last(z, added), _repeat_last(labels, added)
            return model(z.to(noise.dtype), torch.full((len(z),), time, device=z.device), labels)[:count].float()

        def predict(z: Tensor, time: float, guided: bool) -> tuple[Tensor, Tensor | None]:
            if not guided:
                return run(z, time, labels), None
            if mixes:  # the halves must not choose among each other's tokens
                return run(z, time, labels), run(z, time, null_labels)
            return run(torch.cat([z, z]), time, torch.cat([labels, null_labels])).chunk(2)

        return self.integrate(
            predict,
            start,
            steps=steps,
            method=method,
            cfg_scale=cfg_scale,
            step_noise=step_noise or (lambda: torch.randn_like(start)),
        )

    def pick_method(self, method: str | None, steps: int | None) -> tuple[str, int | None]:
        """The sampler and its number of steps, defaults filled in.

        Raises:
            ValueError: an unknown method, fewer than one step, or steps for a method that chooses its own.
        """
        method = next(iter(self.methods)) if method is None else method
        if method not in self.methods:
            raise ValueError(f"method must be {' or '.join(f'{name!r}' for name in self.methods)}, got {method!r}")
        if self.methods[method] is None:
            if steps is not None:
                raise ValueError(f"steps must be left out with {method!r}, which chooses its own, got {steps}")
            return method, None
        steps = self.methods[method] if steps is None else steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {steps!r}")
        return method, steps


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a wrapper that keeps it as `module`, as DistributedDataParallel and AveragedModel do, or itself."""
    return getattr(model, "module", model)


def check_numbers(objective: Objective) -> None:
    """Raise a ValueError that names the first setting that is no finite number, nor None where that is a default."""
    for spec in fields(objective):
        value = getattr(objective, spec.name)
        values = value if isinstance(spec.default, tuple) and isinstance(value, list | tuple) else [value]
        for one in values:
            is_number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
            if not is_number and not (one is None and spec.default is None):
                raise ValueError(f"{spec.name} must be made of finite numbers, got {value!r}: correct that setting")


def check_settings(objective: Objective, **holds: tuple[bool, str]) -> None:
    """Raise a ValueError that names the first setting that does not hold, its value and what was expected."""
    for name, (fine, expected) in holds.items():
        if not fine:
            raise ValueError(f"{name} must be {expected}, got {getattr(objective, name)!r}: correct that setting")


def _repeat_last(batch: Tensor, times: int) -> Tensor:
    """(N, ...) -> (N + times, ...)"""
    return torch.cat([batch, batch[-1:].expand(times, *batch.shape[1:])]) if times else batch


def _check_batch(name: str, images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"{name} must be (N, C, H, W) float, got {tuple(images.shape)} {images.dtype}")
    if len(images) == 0:
        raise ValueError(f"{name} is an empty batch, shape {tuple(images.shape)}: pass at least one sample")


def _check_length(name: str, values: Tensor, images: Tensor) -> None:
    if values.shape != (len(images),):
        raise ValueError(f"{name} must have one entry per sample, ({len(images)},), got {tuple(values.shape)}")


def _check_sampling_labels(name: str, labels: Tensor, noise: Tensor, model: nn.Module) -> None:
    """Labels of samples are the classes and, where the model has one, the null label."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(labels).__name__}; use torch.tensor(...)")
    _check_length(name, labels, noise)
    if model.null_label is not None:
        labels = labels.masked_fill(labels == model.null_label, 0)  # which is a class
    elif (labels == model.num_classes).any():
        raise ValueError(_no_null_label(f"{name} holds {model.num_classes}, which asks for samples of no class"))
    check_labels(labels, model.num_classes)


def _null_labels(model: nn.Module, noise: Tensor) -> Tensor:
    if model.null_label is None:
        raise ValueError(_no_null_label("guidance (cfg_scale other than 1) needs samples of no class"))
    return torch.full((len(noise),), model.null_label, dtype=torch.int64, device=noise.device)


def _no_null_label(request: str) -> str:
    return (
        f"{request}, but this model has no null label: it was built with class_dropout_prob=0. "
        "Sample with class labels and cfg_scale=1, or train a model with label dropout"
    )
