"""Rectified flow: straight paths from noise at t = 0 to data at t = 1, and the ODE solvers that follow them.

Source: X. Liu, C. Gong, Q. Liu, "Flow Straight and Fast" (ICLR 2023); time runs as in DiffMoE's and DSMoE's training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmoe_kernels.checks import at_least_float32
from models.data import check_labels

Method = Literal["euler", "heun"]


@dataclass(frozen=True)
class FlowLoss:
    """One evaluation of the training loss, float32.

    loss: () mean of `mse` plus the model's own auxiliary losses, to call `backward` on.
    mse: (N,) squared error of the velocity of each sample, averaged over channels and pixels.
    aux: the model's record of router statistics, or None where it has none.
    """

    loss: Tensor
    mse: Tensor
    aux: Any | None


class RectifiedFlow:
    """Trains `model(z_t, t, labels)` to predict the velocity x - noise of z_t = t * x + (1 - t) * noise, t in [0, 1].

    A model may predict more channels than the images have (a learned sigma): the first ones are the velocity.
    Besides being called, a model needs `num_classes` and `null_label` (the label of "no class", None without one).
    """

    noise_scale = 1.0  # standard deviation of the noise that paths start from
    last_step_is_euler = False  # so that the model is never asked at t = 1

    def draw_times(self, count: int, device: torch.device) -> Tensor:
        """(count,) training times from torch's global generator."""
        return torch.rand(count, device=device)

    def velocity(self, prediction: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What the model's output means at z (N, C, H, W) and t (N, 1, 1, 1)."""
        return prediction

    def guidance(self, cfg_scale: float, time: float) -> float:
        """The guidance at a time of sampling."""
        return cfg_scale

    def loss(
        self, model: nn.Module, x: Tensor, labels: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> FlowLoss:
        """The loss of a batch, with times and noise drawn from torch's global generator where not given.

        Args:
            model: called as `model(z, t, labels, return_aux=True)`, returns (N, at least C, H, W) and its aux record.
            x: (N, C, H, W) images.
            labels: (N,) int64 in [0, model.num_classes); the model drops labels itself in training mode.
            t: (N,) float times in [0, 1]; from `draw_times` by default.
            noise: (N, C, H, W); standard normal by default.

        Raises:
            TypeError, ValueError: an empty batch, labels or times out of range, shapes that do not fit.
        """
        _check_batch("x", x)
        check_labels(labels, model.num_classes)
        _check_length("labels", labels, x)
        if t is None:
            t = self.draw_times(len(x), x.device)
        else:
            _check_times(t, x)
        if noise is None:
            noise = torch.randn_like(x)
        elif noise.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")

        # In bfloat16 a time of 0.9993 would be 1 and the noise gone.
        data, noise, weight = at_least_float32(x), at_least_float32(noise), at_least_float32(t).view(-1, 1, 1, 1)
        noise = noise * self.noise_scale
        z = weight * data + (1 - weight) * noise
        prediction, aux = model(z.to(x.dtype), t, labels, return_aux=True)
        predicted = self.velocity(at_least_float32(prediction[:, : x.shape[1]]), z, weight)
        error = predicted - self.target(data, noise, z, weight)
        mse = error.square().flatten(1).mean(1)
        aux_loss = getattr(aux, "loss", None)
        loss = mse.mean() if aux_loss is None else mse.mean() + aux_loss.float()
        return FlowLoss(loss, mse, aux)

    def target(self, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity that z (N, C, H, W) on its path from noise to data should have."""
        return data - noise

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        noise: Tensor,
        labels: Tensor,
        *,
        steps: int,
        method: Method = "euler",
        cfg_scale: float = 1.0,
        null_labels: Tensor | None = None,
    ) -> Tensor:
        """Integrate the flow from t = 0 to t = 1 in equal steps; the result is a function of the arguments alone.

        Args:
            model: in evaluation mode.
            noise: (N, C, H, W) start of each path, usually standard normal.
            labels: (N,) int64 in [0, model.num_classes), or `model.null_label` to sample without a class.
            steps: number of solver steps, at least 1.
            method: "euler" calls the model once per step, "heun" twice (the last time at t = 1, unless
                the objective ends with an Euler step).
            cfg_scale: guidance s of u + s * (c - u), on all channels; 1 is plain conditional sampling, and then
                the model runs on N samples, else on 2N (or twice on N, where `model.mixes_samples`).
            null_labels: (N,) labels of the unconditional half; `model.null_label` by default.

        Returns:
            (N, C, H, W) float32.

        Raises:
            TypeError, ValueError: an empty batch, labels out of range, guidance or the null label asked of a model
                that has none, a model in training mode, an unknown method, fewer than one step.
        """
        _check_batch("noise", noise)
        _check_sampler(model, steps, method)
        _check_sampling_labels("labels", labels, noise, model)
        guided = cfg_scale != 1.0
        if guided:
            null_labels = _null_labels(model, noise) if null_labels is None else null_labels
            _check_sampling_labels("null_labels", null_labels, noise, model)
        # Where a sample's result depends on its batch, the halves must not choose among each other's tokens.
        apart = guided and getattr(model, "mixes_samples", False)

        def predict(z: Tensor, time: float, labels: Tensor) -> Tensor:
            t = torch.full((len(z),), time, device=z.device)
            prediction = model(z.to(noise.dtype), t, labels)[:, : z.shape[1]].float()
            return self.velocity(prediction, z, t.view(-1, 1, 1, 1))

        def velocity(z: Tensor, time: float) -> Tensor:
            scale = self.guidance(cfg_scale, time)
            if scale == 1.0:
                return predict(z, time, labels)
            if apart:
                conditional, unconditional = predict(z, time, labels), predict(z, time, null_labels)
            else:
                both = predict(torch.cat([z, z]), time, torch.cat([labels, null_labels]))
                conditional, unconditional = both.chunk(2)
            return unconditional + scale * (conditional - unconditional)

        z = noise.float() * self.noise_scale
        for i in range(steps):
            is_euler = method == "euler" or (self.last_step_is_euler and i == steps - 1)
            step = _euler_step if is_euler else _heun_step
            z = step(velocity, z, i / steps, (i + 1) / steps)
        return z


Velocity = Callable[[Tensor, float], Tensor]


def _euler_step(velocity: Velocity, z: Tensor, t: float, t_next: float) -> Tensor:
    return z + (t_next - t) * velocity(z, t)


def _heun_step(velocity: Velocity, z: Tensor, t: float, t_next: float) -> Tensor:
    v = velocity(z, t)
    v_next = velocity(z + (t_next - t) * v, t_next)
    return z + (t_next - t) * (v + v_next) / 2


def _check_batch(name: str, images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"{name} must be (N, C, H, W) float, got {tuple(images.shape)} {images.dtype}")
    if len(images) == 0:
        raise ValueError(f"{name} is an empty batch, shape {tuple(images.shape)}: pass at least one sample")


def _check_length(name: str, values: Tensor, images: Tensor) -> None:
    if values.shape != (len(images),):
        raise ValueError(f"{name} must have one entry per sample, ({len(images)},), got {tuple(values.shape)}")


def _check_times(t: Tensor, x: Tensor) -> None:
    _check_length("t", t, x)
    if not t.is_floating_point():
        raise TypeError(f"t must be float, got {t.dtype}: flow times lie in [0, 1], they are not step numbers")
    inside = (t >= 0) & (t <= 1)
    if not inside.all():
        raise ValueError(
            f"t must be in [0, 1] (0 is noise, 1 is data), got {t[~inside][:5].tolist()}: "
            "pass the fraction of the path, not a diffusion step or t * 1000"
        )


def _check_sampler(model: nn.Module, steps: int, method: str) -> None:
    if method not in ("euler", "heun"):
        raise ValueError(f'method must be "euler" or "heun", got {method!r}')
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if model.training:
        raise ValueError("model is in training mode, where it drops labels: call model.eval() before sampling")


def _check_sampling_labels(name: str, labels: Tensor, noise: Tensor, model: nn.Module) -> None:
    """Labels of samples are the classes and, where the model has one, the null label."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(labels).__name__}; use torch.tensor(...)")
    _check_length(name, labels, noise)
    if model.null_label is not None:
        labels = labels[labels != model.null_label]
        if labels.numel() == 0:
            return
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
