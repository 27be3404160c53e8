"""What a run's future depends on besides the weights: where its random numbers are, and what computes it."""

import platform
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the model's weights, in evaluation mode, with its buffers as they are now.

    DiffMoE's thresholds are a moving average already, from 0 on: averaged once more they would stay near 0 for
    1 / (1 - decay) steps, and send every token to every expert.
    """
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return ema.eval().requires_grad_(False)


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
