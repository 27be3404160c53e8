"""What chooses its backend by itself against the reference vectors, with the Triton kernels wherever an op has them."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import diffmoe_kernels.ops
from diffmoe_kernels.backend import Implementation
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.golden.test_expert_choice import test_capacity_loss_and_thresholds  # noqa: F401
from tests.golden.test_jit import *  # noqa: F403
from tests.golden.test_layers import test_masked_groups_lose_with_the_sound_fill  # noqa: F401
from tests.golden.test_models import *  # noqa: F403

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
calls: list[str] = []
MIXTURES = {
    "dsmoe": {"router_topk", "experts"},
    "diffmoe": {"token_drop", "experts"},
    "jit": {"router_topk", "experts"},
    "tcdit": {"router_topk", "experts"},
    "ecdit": {"token_drop", "experts"},
    "dense": set(),
}


@pytest.fixture(autouse=True)
def triton_first(monkeypatch):
    """Makes "auto" take the kernels, and counts their calls."""
    calls.clear()
    for info in pkgutil.iter_modules(diffmoe_kernels.ops.__path__):
        module = importlib.import_module(f"diffmoe_kernels.ops.{info.name}")
        for name, table in vars(module).items():
            if isinstance(table, dict) and isinstance(table.get("triton"), Implementation):
                kernel = table["triton"]

                def counted(*args, _kernel=kernel.function, _name=info.name, **kwargs):
                    calls.append(_name)
                    return _kernel(*args, **kwargs)

                first = {"triton": Implementation(counted, kernel.why_not)}
                monkeypatch.setattr(module, name, {**first, **{k: v for k, v in table.items() if k != "triton"}})


def test_rectified_flow_sampling() -> None:  # noqa: F811
    """Of DiffMoE by Euler alone: the other model and methods call no kernel that the tests above do not."""
    from tests.golden.test_models import test_rectified_flow_sampling as run

    run("rf_diffmoe_train", "euler")


@pytest.mark.parametrize("name", MODELS)  # noqa: F405
def test_outputs_and_gradients(name) -> None:  # noqa: F811
    from tests.golden.test_models import test_outputs_and_gradients as run

    run(name)
    (own,) = [ops for part, ops in MIXTURES.items() if part in name]
    assert {"rope_attention", "adaln", *own} <= set(calls)
