"""A step of training and a step of sampling of a whole model, as users run them.

A training step is what `models.train` does with a batch that lies on the GPU: forward, backward, AdamW (fused), the
routing state, the moving average; in bfloat16 by autocast over float32 weights. Clipping the gradient and reading the
loss are left out. A sampling step is an Euler step with guidance, so that the model sees each image twice; what
autocast would round of its weights is in bfloat16 before it starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import timing
from models import DiT, JiT
from models.cuda_graphs import Captured, CapturedModel
from models.objectives import TrainingLoss, objective_for
from models.precision import cast_weights_
from models.training.gradients import Gradients
from models.training.processes import Processes
from models.training.state import MovingAverage

GUIDANCE = 1.5


class Training:
    """A model in training, under autocast where the dtype is bfloat16.

    first_steps: how many there are until all is compiled and captured.
    """

    first_steps = 1

    def __init__(self, model: DiT, dtype: torch.dtype) -> None:
        self.model, self.objective = model.train(), objective_for(model)
        self.device = next(model.parameters()).device
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
        self.gradients = Gradients(self.model, self.objective, Processes(), precision)

    def conditions(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(count,) labels, (count,) times and noise like the images: for the same count the same ones."""
        torch.manual_seed(2)
        size = count, self.model.in_channels, self.model.input_size, self.model.input_size
        labels = torch.randint(self.model.num_classes, (count,), device=self.device)
        return labels, self.objective.draw_times(count, self.device), torch.randn(size, device=self.device)

    def loss(self, images: Tensor, labels: Tensor, times: Tensor, noise: Tensor) -> TrainingLoss:
        with self.autocast():
            return self.objective.loss(self.model, images, labels, t=times, noise=noise)

    def outcome(self, images: Tensor, at_once: int) -> dict[str, Tensor]:
        """The images' errors, and the gradients by the parameters' names, computed from parts of the batch."""
        self.model.zero_grad(set_to_none=True)
        errors = []
        for part in zip(*(one.split(at_once) for one in (images, *self.conditions(len(images)))), strict=True):
            result = self.loss(*part)
            (result.loss * (len(part[0]) / len(images))).backward()
            errors.append(result.mse.detach())
        gradients = {f"grad of {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return {"error of each image": torch.cat(errors), **gradients}

    def begin(self, captured: bool = False) -> None:
        """Makes what a run of training has besides the model, with a CUDA graph or without."""
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.average = MovingAverage(self.model, decay=0.9999)
        if captured:
            self.gradients, self.first_steps = Captured(self.gradients, self.device, trained), Captured.WARM_UP + 1

    def step_on(self, images: Tensor) -> Callable[[], None]:
        """The step of a batch; it leaves no gradients."""
        conditions = self.conditions(len(images))

        def step() -> None:
            _, auxes = self.gradients(images, *conditions)
            self.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.model.update_routing_state(auxes)

        return step

    def update(self) -> None:
        """What takes as long whatever the batch is: AdamW and the moving average."""
        self.optimizer.step()
        self.average.update_parameters(self.model)

    def apart(self, images: Tensor) -> dict[str, float]:
        """The time of `update` by itself."""
        self.loss(images, *self.conditions(len(images))).loss.backward()
        run, _ = timing.timed([self.update], captured=False, on_gpu=self.device.type == "cuda")
        times = []
        for _ in range(timing.FEWEST_ROUNDS):
            before = timing.CLOCK()
            run()
            times.append(timing.CLOCK() - before)
        self.model.zero_grad(set_to_none=True)
        return {"optimizer_ms": statistics.median(times) * 1e3}

    def grows_to(self) -> int:
        """Bytes that every step comes to hold, whatever the batch is, beyond what is there between steps: gradients."""
        return sum(one.nbytes for one in self.model.parameters() if one.requires_grad)


class Sampling:
    """A model that samples, under autocast where the dtype is bfloat16.

    first_steps: how many there are until all is compiled and captured.
    """

    first_steps = 1

    def __init__(self, model: DiT, dtype: torch.dtype) -> None:
        guided_at_first = {"guidance_interval": (0.0, 1.0)} if isinstance(model, JiT) else {}
        self.model, self.objective = model.eval(), objective_for(model, **guided_at_first)
        self.device = next(model.parameters()).device
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        cast_weights_(model, dtype)
        self.caller: nn.Module = self.model

    def labels(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device) % self.model.num_classes

    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """One step from noise all the way to images."""
        with self.autocast():
            return self.objective.sample(self.caller, noise, labels, steps=1, method="euler", cfg_scale=GUIDANCE)

    def outcome(self, noise: Tensor, at_once: int) -> dict[str, Tensor]:
        """The samples, computed from parts of the batch."""
        parts = zip(noise.split(at_once), self.labels(len(noise)).split(at_once), strict=True)
        return {"samples": torch.cat([self.sample(*part) for part in parts])}

    def begin(self, captured: bool = False) -> None:
        """Sampling has nothing besides the model, but for its CUDA graphs."""
        if captured:
            self.caller, self.first_steps = CapturedModel(self.model), Captured.WARM_UP + 1

    def step_on(self, noise: Tensor) -> Callable[[], Tensor]:
        """The step of a batch."""
        return partial(self.sample, noise, self.labels(len(noise)))

    def apart(self, noise: Tensor) -> dict[str, float]:
        return {}

    def grows_to(self) -> int:
        return 0
