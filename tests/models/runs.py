"""Training runs small enough for tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from models.options import flag
from models.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
# "bias": router buffers that change, so that they must be averaged, saved and restored.
TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_experts": 4, "moe_intermediate_size": 8, "balance": "bias"}


def tiny(output: Path, **options) -> TrainConfig:
    """Options of a run that takes some milliseconds per step; `model_options` are added to `TINY`."""
    model_options = {**TINY, **options.pop("model_options", {})}
    quick = {"batch_size": 16, "warmup_steps": 2, "log_every": 1, "sample_rows": 1, "sample_steps": 2}
    return TrainConfig(output=str(output), model_options=model_options, **{**quick, **options})


def command_line(config: TrainConfig) -> list[str]:
    """`config` as command-line options."""
    words = []
    for name, value in asdict(config).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag(name)}")
        elif isinstance(value, dict):
            words += [f"--{flag(name)}", json.dumps(value)]
        else:
            words += [f"--{flag(name)}", "null" if value is None else str(value)]
    return words


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on more, and a subprocess can be given the same number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(code: list[str], config: TrainConfig) -> subprocess.Popen:
    """Python's `code` with `config` on its command line, in a process group of its own and on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *code, *command_line(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
