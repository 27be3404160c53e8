"""bfloat16 casts experts once in sampling, TF32 is allowed to a run alone; both come back as they were."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_kernels.modules import Experts
from diffmoe_kernels.testing import relative_error
from diffmoe_kernels.triton_support import HAS_TRITON
from models import create_model
from models.precision import experts_cast_once, float32_products
from models.sampling import sample_batches, sample_images
from models.training.trainer import Trainer
from tests.models.runs import tiny

LABELS = torch.tensor([0, 1])


class Casts(TorchDispatchMode):
    """Counts the copies to bfloat16 of tensors with three dimensions of given shapes."""

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


def expert_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [one for part in model.modules() if isinstance(part, Experts) for one in part.parameters()]


@pytest.mark.parametrize("name", ["DSMoE-digits", "DiffMoE-digits", "JiTMoE-digits"])
def test_cast_once_for_all_steps_and_batches(name):
    model = model_of(name)
    masters = [one.detach().clone() for one in expert_weights(model)]
    matrices = [one for one in expert_weights(model) if one.dim() == 3]
    with Casts({one.shape for one in matrices}) as casts:
        low = sample_images(model, LABELS, steps=2, batch_size=1, precision="bfloat16")
    assert casts.count == len(matrices) > 0
    assert all(torch.equal(one, master) for one, master in zip(expert_weights(model), masters, strict=True))
    assert all(one.dtype == torch.float32 for one in model.parameters())
    full = sample_images(model, LABELS, steps=2, batch_size=1)
    assert low.dtype == torch.float32
    assert 0 < relative_error(low, full) < 0.1


def test_the_same_as_casting_at_every_call():
    model = model_of("DSMoE-digits")
    with torch.autocast("cpu", torch.bfloat16):
        each = sample_images(model, LABELS, steps=2)
    assert torch.equal(sample_images(model, LABELS, steps=2, precision="bfloat16"), each)


def test_masters_come_back_after_an_error():
    model = model_of("DSMoE-digits")
    with pytest.raises(RuntimeError, match="stop"), experts_cast_once(model, "bfloat16"):
        assert {one.dtype for one in expert_weights(model)} == {torch.bfloat16}
        raise RuntimeError("stop")
    assert {one.dtype for one in expert_weights(model)} == {torch.float32}


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
    with torch.no_grad(), experts_cast_once(layer, "bfloat16"), Casts(shapes) as casts:
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
