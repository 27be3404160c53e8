"""The reference vectors again, with the Triton kernels wherever an op has them."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import diffmoe_kernels.ops
from diffmoe_kernels.backend import Implementation
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.golden.test_expert_choice import *  # noqa: F403
from tests.golden.test_jit import *  # noqa: F403
from tests.golden.test_layers import *  # noqa: F403
from tests.golden.test_models import *  # noqa: F403

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
calls: list[str] = []


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


@pytest.mark.parametrize("name", ["rf_dsmoe_train", "rf_diffmoe_train"])
def test_rectified_flow_sampling(name) -> None:  # noqa: F811
    """By Euler alone: no method of sampling calls other kernels."""
    from tests.golden.test_models import test_rectified_flow_sampling as run

    run(name, "euler")


def test_the_kernels_are_called() -> None:
    from tests.golden.test_models import test_outputs_and_gradients as run

    for name, ops in (
        ("model_dsmoe_dit_rope2d", {"router_topk", "experts", "rope_attention"}),
        ("model_diffmoe_dit", {"token_drop", "experts"}),
    ):
        calls.clear()
        run(name)
        assert ops <= set(calls)
