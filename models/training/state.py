"""What a run's future depends on besides the weights: where its random numbers are, and what computes it."""

import platform
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """A moving average of a model's weights, in evaluation mode, with its saved buffers as they are now.

    DiffMoE's thresholds are a moving average already, from 0 on: averaged once more they would stay near 0 for
    1 / (1 - decay) steps, and send every token to every expert.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.eval().requires_grad_(False)
        saved = self.module.state_dict()
        self.buffer_names = [name for name, _ in self.module.named_buffers() if name in saved]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """The library's sends the GPU the number of updates, for which the host waits, and copies every fixed table."""
        averaged, current = [*self.module.parameters()], [*model.parameters()]
        if self.n_averaged == 0:
            torch._foreach_copy_(averaged, current)
        else:
            self.multi_avg_fn(averaged, current, self.n_averaged)
        for name in self.buffer_names:
            self.module.get_buffer(name).copy_(model.get_buffer(name))
        self.n_averaged += 1


def random_state(device: torch.device) -> dict[str, Any]:
    """Of torch's global generators that training on `device` draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []}


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0], device)


def seed_process(*numbers: int) -> None:
    """Seed torch's global generators by all of these: the run's seed, the process's rank, the step."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and settings of which each may round otherwise."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return {**versions, "device": device.type, "threads": torch.get_num_threads()}
