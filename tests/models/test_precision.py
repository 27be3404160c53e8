"""bfloat16 casts weights once in sampling, TF32 is allowed to a run alone; both come back as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_kernels.modules import Experts
from diffmoe_kernels.testing import relative_error
from diffmoe_kernels.triton_support import HAS_TRITON
from models import create_model
from models.precision import float32_products, weights_cast_once
from models.sampling import sample_batches, sample_images
from models.training.trainer import Trainer
from tests.models.runs import tiny

LABELS = torch.tensor([0, 1])


class Casts(TorchDispatchMode):
    """Counts the copies to bfloat16 of tensors of given shapes."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.count += (kwargs or {}).get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


def model_of(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def weights_to_cast(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    layers = [part for part in model.modules() if isinstance(part, Experts | torch.nn.Linear)]
    return [one for layer in layers for one in layer.parameters()]


NAMES = [f"{family}-digits" for family in ("DiT", "DSMoE", "DiffMoE", "JiTMoE", "TC-DiT")]


@pytest.mark.parametrize("name", NAMES)
def test_cast_once_for_all_steps_and_batches(name):
    model = model_of(name)
    masters = [(one, one.detach().clone()) for one in model.parameters()]
    matrices = [one for one in weights_to_cast(model) if one.dim() > 1]
    with Casts({one.shape for one in matrices}) as casts:
        low = sample_images(model, LABELS, steps=2, batch_size=1, precision="bfloat16")
    assert casts.count == len(matrices) > 0
    for one, (master, values) in zip(model.parameters(), masters, strict=True):
        assert one is master and one.dtype == torch.float32 and torch.equal(one, values)
    full = sample_images(model, LABELS, steps=2, batch_size=1)
    assert low.dtype == torch.float32
    assert 0 < relative_error(low, full) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_casting_at_every_call(name):
    model = model_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        each = sample_images(model, LABELS, steps=2)
    assert torch.equal(sample_images(model, LABELS, steps=2, precision="bfloat16"), each)


def test_compiled_blocks_cast_no_weight_meanwhile():
    """Autocast keeps casts in eager code alone: in a graph they are part of every call."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    model, counts = model_of("DSMoE-digits", depth=2), []
    shapes = {one.shape for one in weights_to_cast(model) if one.dim() > 1}

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        casts = [one.args[0] for one in graph.graph.nodes if one.target is torch.ops.aten._to_copy.default]
        counts.append(sum(one.op == "placeholder" and one.meta["val"].shape in shapes for one in casts))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count)
    for block in model.blocks:
        block.compile(backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        each = sample_images(model, LABELS, steps=2)
    assert len(counts) == 2 and min(counts) >= 4  # attention's two, the modulation's, the MLP's
    counts.clear()
    assert torch.equal(sample_images(model, LABELS, steps=2, precision="bfloat16"), each)
    assert counts == [0, 0]
    assert torch.equal(sample_images(model, LABELS, steps=2, precision="bfloat16"), each)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample_images(model, LABELS, steps=2), each)
    assert len(counts) == 2  # no graph more


def test_masters_come_back_after_an_error():
    model = model_of("DSMoE-digits")
    with pytest.raises(RuntimeError, match="stop"), weights_cast_once(model, "bfloat16"):
        assert {one.dtype for one in weights_to_cast(model)} == {torch.bfloat16}
        raise RuntimeError("stop")
    assert {one.dtype for one in model.parameters()} == {torch.float32}


def test_whoever_stops_early_leaves_the_model_as_it_was():
    model = model_of("DSMoE-digits")
    batches = sample_batches(model, LABELS, steps=1, batch_size=1, precision="bfloat16")
    first = next(batches)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert torch.equal(first, sample_images(model, LABELS[:1], steps=1, precision="bfloat16"))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_kernels_cast_nothing_meanwhile():
    layer = Experts(16, 8, 3, backend="triton")
    from diffmoe_kernels import Routing

    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2), 3)
    shapes = {one.shape for one in layer.parameters()}
    with torch.no_grad(), weights_cast_once(layer, "bfloat16"), Casts(shapes) as casts:
        layer(torch.randn(2, 16, dtype=torch.bfloat16), routing)
    assert casts.count == 0


@pytest.mark.parametrize(("precision", "setting"), [("tf32", "high"), ("float32", "highest"), ("bfloat16", "highest")])
def test_products_may_be_tf32_in_training_and_sampling_alone(precision, setting, tmp_path):
    seen: dict[str, set[str]] = {"forward": set(), "backward": set()}

    def note(when: str, *_: object) -> None:
        seen[when].add(torch.get_float32_matmul_precision())

    trainer = Trainer(tiny(tmp_path / "run", steps=1, precision=precision, accumulation=2))
    layer = trainer.model.blocks[0].attn
    layer.register_forward_hook(lambda *_: note("forward"))
    layer.qkv.weight.register_hook(lambda _: note("backward"))
    trainer.fit()
    assert seen == {"forward": {setting}, "backward": {setting}}

    model = trainer.averages["ema"].module
    seen["forward"].clear()
    model.blocks[0].attn.register_forward_hook(lambda *_: note("forward"))
    sample_images(model, LABELS, steps=1, precision=precision)
    assert seen["forward"] == {setting}
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_setting_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), float32_products("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # which the kernels read
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
