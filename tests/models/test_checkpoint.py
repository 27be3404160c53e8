"""Official configurations and state dicts: what loads, what comes back, what is refused."""

from __future__ import annotations

import argparse
import copy
import os

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from diffmoe_kernels import MoE
from models import CONFIGS, create_model
from models.checkpoint import build_official, load_official, official_state_dict
from tests.golden.test_models import TARGETS
from tests.golden.vectors import load_case
from tests.models.helpers import random_inputs, randomize

DSMOE = "models.models_DSMoE.DiT"
CASE = load_case("model_dsmoe_dit_rope2d")
PARAMS = CASE.config["ctor"]


def build(**changes) -> torch.nn.Module:
    moe = PARAMS["MoE_config"] | changes.pop("MoE_config", {})
    return build_official(DSMOE, PARAMS | {"MoE_config": moe} | changes)


def assert_loaded(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = official_state_dict(model)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "module.net.", "_orig_mod."])
def test_prefixes_are_removed(prefix) -> None:
    state = {prefix + key: value for key, value in CASE.state_dict.items()}
    assert_loaded(load_official(build(), state), CASE.state_dict)


@pytest.mark.parametrize(
    ("weights", "entry"),
    [(None, "ema"), ("ema", "ema"), ("model", "model"), (None, "model_ema1"), ("ema2", "model_ema2")],
)
def test_entries_of_a_checkpoint(tmp_path, weights, entry) -> None:
    other = {key: torch.zeros_like(value) for key, value in CASE.state_dict.items()}
    content = {"model": other, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4), "epoch": 3}
    content[entry] = CASE.state_dict
    torch.save(content, tmp_path / "checkpoint.pt")
    assert_loaded(load_official(build(), tmp_path / "checkpoint.pt", weights=weights), CASE.state_dict)


def test_an_entry_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="expected a checkpoint with model_ema2, found model, epoch"):
        load_official(build(), {"model": CASE.state_dict, "epoch": 1}, weights="ema2")
    with pytest.raises(ValueError, match="weights: expected one of 'ema', 'ema2', 'model' or None, got 'best'"):
        load_official(build(), CASE.state_dict, weights="best")
    with pytest.raises(ValueError, match="expected None for a plain state dict"):
        load_official(build(), CASE.state_dict, weights="ema")


def test_safetensors_file(tmp_path) -> None:
    save_file(CASE.state_dict, tmp_path / "model.safetensors")
    assert_loaded(load_official(build(), tmp_path / "model.safetensors"), CASE.state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_or_cast(dtype) -> None:
    half = {key: value.to(dtype) for key, value in CASE.state_dict.items()}
    assert_loaded(load_official(build(), half), half)
    cast = load_official(build(), half, dtype=torch.float32)
    assert_loaded(cast, {key: value.float() for key, value in half.items()})


def test_mixed_dtypes_within_one_of_our_tensors() -> None:
    state = dict(CASE.state_dict)
    state["blocks.1.mlp.experts.blocks.2.up_proj.weight"] = torch.zeros(24, 48, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"experts\.blocks\.2\.up_proj\.weight: expected torch\.float32.*pass dtype="):
        load_official(build(), state)


def test_loading_onto_the_meta_device() -> None:
    with torch.device("meta"):
        model = build()
    load_official(model, CASE.state_dict).eval()
    assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])
    reference = load_official(build(), CASE.state_dict).eval()
    inputs = CASE["input.x"], CASE["input.t"], CASE["input.y"]
    assert torch.equal(model(*inputs), reference(*inputs))


def test_a_router_without_a_bias_leaves_the_meta_device() -> None:
    case = load_case("model_tcdit")
    with torch.device("meta"):
        model = build_official(TARGETS["tc"], case.config["ctor"])
    load_official(model, case.state_dict)
    assert not any(one.is_meta for one in (*model.parameters(), *model.buffers()))
    assert model.eval()(case["input.x"], case["input.t"], case["input.y"]).isfinite().all()


WRAPS = {"checkpointed": checkpoint_wrapper, "compiled": torch.compile}
WRAPS["checkpointed and compiled"] = lambda layer: torch.compile(checkpoint_wrapper(layer))
WRAPS["compiled and checkpointed"] = lambda layer: checkpoint_wrapper(torch.compile(layer))


@pytest.mark.parametrize("case", ["model_dsmoe_dit_rope2d", "model_diffmoe_dit"])
@pytest.mark.parametrize("place", ["", "mlp", "mlp.router"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_model_of_wrapped_layers_loads_and_saves(wrap, place, case) -> None:
    case = load_case(case)
    model = build_official(TARGETS[case.config["kind"]], case.config["ctor"])
    for buffer in model.buffers():
        buffer.fill_(7)
    for index, block in enumerate(model.blocks):
        path, _, name = f"blocks.{index}.{place}".rstrip(".").rpartition(".")
        if place != "mlp.router" or hasattr(block.mlp, "router"):
            parent = model.get_submodule(path)
            setattr(parent, name, WRAPS[wrap](getattr(parent, name)))
    assert_loaded(load_official(model, case.state_dict), case.state_dict)


def test_an_optimizer_goes_on_with_loaded_weights() -> None:
    model = randomize(create_model("DSMoE-digits"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load_official(model, official_state_dict(randomize(create_model("DSMoE-digits"))))
    before = official_state_dict(model)
    model(*random_inputs(model)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(official_state_dict(model)["x_embedder.proj.weight"], before["x_embedder.proj.weight"])


def test_gradients_by_official_name() -> None:
    """Replacing parameters by other tensors is seen: gate and up, and experts, are cut out of what is there."""
    layer = MoE(8, 6, 3, 2, shared_intermediate_size=6)
    replaced = copy.deepcopy(layer)
    up = torch.arange(3 * 12 * 8.0).view(3, 12, 8)
    replaced.experts.gate_up_proj = torch.nn.Parameter(up)
    official = official_state_dict(replaced)
    assert torch.equal(official["experts.blocks.2.gate_proj.weight"], up[2, :6])
    assert torch.equal(official["experts.blocks.2.up_proj.weight"], up[2, 6:])
    official["experts.blocks.2.up_proj.weight"].zero_()
    assert torch.equal(replaced.experts.gate_up_proj, up), "the official state dict must be a copy"


def test_every_misfit_is_named_with_both_shapes_and_nothing_is_loaded() -> None:
    state = dict(CASE.state_dict)
    del state["blocks.1.mlp.gate.weight"]
    state["x_embedder.proj.bias"] = torch.zeros(47)
    state["blocks.9.attn.qkv.bias"] = torch.zeros(144)
    model = build()
    before = official_state_dict(model)
    with pytest.raises(ValueError, match="3 of its keys do not fit") as caught:
        load_official(model, state)
    message = str(caught.value)
    assert "missing key blocks.1.mlp.gate.weight: the model expects (8, 48), the checkpoint has nothing" in message
    assert "shape of x_embedder.proj.bias: the model expects (48,), the checkpoint has (47,)" in message
    assert "extra key blocks.9.attn.qkv.bias: the model has nothing, the checkpoint has (144,)" in message
    assert_loaded(model, before)


def test_a_checkpoint_of_another_model() -> None:
    dense = load_case("model_dense_dit")
    with pytest.raises(ValueError, match=r"extra key blocks\.1\.mlp\.fc1\.weight.*\(192, 48\)"):
        load_official(build(), dense.state_dict)
    with pytest.raises(ValueError, match=r"and \d+ more such keys"):
        load_official(create_model("DSMoE-digits"), CASE.state_dict)


def test_truncated_and_wrong_files(tmp_path) -> None:
    torch.save({"ema": CASE.state_dict}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    save_file(CASE.state_dict, tmp_path / "whole.safetensors")
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    broken = {"half.pt": data[: len(data) // 2], "half.safetensors": tensors[: len(tensors) // 2]}
    broken |= {"empty.pt": b"", "text.pt": b"not a checkpoint"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_official(build(), tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="found tensors beside what is none: epoch$"):
        load_official(build(), {**CASE.state_dict, "epoch": 3})
    with pytest.raises(ValueError, match="expected a state dict or a checkpoint, got list"):
        load_official(build(), tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*nowhere.pt"):
        load_official(build(), tmp_path / "nowhere.pt")


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_no_code_is_executed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": CASE.state_dict, "args": _Bomb()}, "bomb.pt")
    with pytest.raises(ValueError, match="bomb.pt: can't be loaded safely"):
        load_official(build(), "bomb.pt")
    assert not (tmp_path / "executed").exists()


def test_defaults_of_published_files() -> None:
    """Two published files leave skip_first2 and use_shared_expert out."""
    moe = {key: value for key, value in PARAMS["MoE_config"].items() if key not in ("skip_first2", "use_shared_expert")}
    model = build_official(DSMOE, PARAMS | {"MoE_config": moe})
    assert model.config.num_dense_blocks == 0 and model.config.shared_expert
    assert model.config.masked_group_fill == 0.0
    assert create_model("DSMoE-digits").config.masked_group_fill == float("-inf")


def test_ignored_keys_and_options() -> None:
    ignored = {"use_type": "all", "group_bins": 8, "local_top_p": 4, "skip_last2": True, "capacity_schedule": {"a": 1}}
    reference = build()
    model = build(MoE_config=ignored, use_swiglu=True, CapacityPred_loss_weight=1, sliding_window=4)
    assert model.config == reference.config
    assert build(MoE_config={"skip_first2": True}).config.num_dense_blocks == 2
    assert build(MoE_config={"skip_first2": 3}).config.num_dense_blocks == 3
    assert build(MoE_config={"skip_first2": None}).config.num_dense_blocks == 0  # neither a flag nor a number
    assert build(enable_gqa=True).config.num_kv_heads == 2
    assert build(norm_type="rmsnorm").blocks[0].norm1.weight.shape == (48,)
    assert build(rope_type="none").pos_embed.shape == (1, 16, 48)
    assert "pos_embed" not in official_state_dict(build(rope_type="1d"))


def test_dense_dit_defaults_are_xl() -> None:
    with torch.device("meta"):
        model = build_official("models.models_DiT.DiT", {})
    assert model.config == CONFIGS["DiT-XL/2"]
    swiglu = build_official(
        "models.models_DiT.DiT", {"depth": 1, "hidden_size": 32, "num_heads": 4, "use_swiglu": True}
    )
    assert official_state_dict(swiglu)["blocks.0.mlp.gate_proj.weight"].shape == (128, 32)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("models.models_DSMOE.DiT", {}, "did you mean 'models.models_DSMoE.DiT'"),
        ("model_jit.JiT", {}, "MoE_config: unknown parameter; did you mean 'moe_config'"),
        ("resnet", {}, "target: expected one of models.models_DiT.DiT, .*, got 'resnet'$"),
        (
            DSMOE,
            {"MoE_config": PARAMS["MoE_config"] | {"skip_first2": "yes"}},
            "skip_first2: expected a flag or a number",
        ),
        (DSMOE, {"use_sinks": True}, "use_sinks: expected False, attention sinks"),
        (DSMOE, {"use_kda": True}, "use_kda: expected False"),
        (DSMOE, {"use_flash_attn": True}, "use_flash_attn: expected False"),
        (DSMOE, {"hiden_size": 3}, "hiden_size: unknown parameter; did you mean 'hidden_size'"),
        (DSMOE, {"MoE_config": None}, "MoE_config: expected a mapping, got None"),
        (DSMOE, {"MoE_config": {"num_experts": 8}}, "MoE_config: expected num_experts_per_tok, moe_intermediate_size"),
        (
            DSMOE,
            {"MoE_config": PARAMS["MoE_config"] | {"n_groups": 2}},
            "n_groups: unknown parameter; did you mean 'n_group'",
        ),
        (DSMOE, {"MoE_config": PARAMS["MoE_config"] | {"init_MoeMLP": True}}, "init_MoeMLP: expected False"),
        (DSMOE, {"MoE_config": PARAMS["MoE_config"] | {"n_group": 3}}, "^n_group: expected a divisor"),
        (
            DSMOE,
            {"MoE_config": PARAMS["MoE_config"] | {"num_experts_per_tok": 99}},
            "^num_experts_per_tok: expected 1 to",
        ),
        (DSMOE, {"norm_type": "bn"}, "^norm_type: expected one of"),
        (DSMOE, {"num_classes": "10"}, "^num_classes: expected int, got '10'"),
        (None, {}, "^target: expected one of .*, got None$"),
    ],
)
def test_bad_official_configurations(target, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_official(target, PARAMS | changes)
    for params in (None, [1]):
        with pytest.raises(ValueError, match="params: expected the mapping|target: expected one of"):
            build_official(target, params)


@pytest.mark.parametrize(("family", "kind"), [("TC", "int"), ("EC", "float"), ("Diff", "float")])
def test_a_capacity_that_is_none(family, kind) -> None:
    target = f"models.models_{family}{'MoE' if family == 'Diff' else 'DiT'}.DiT"
    moe = {"num_experts": 4, "capacity": None, "interleave": True}
    with pytest.raises(ValueError, match=f"^capacity: expected {kind}, got None"):
        build_official(target, {"MoE_config": moe})


def test_a_compiled_model_loads_and_saves() -> None:
    compiled = torch.compile(build(), backend="eager")
    assert_loaded(load_official(compiled, CASE.state_dict), CASE.state_dict)


DIFFMOE = load_case("model_diffmoe_dit").config["ctor"]


def test_baselines_take_the_official_defaults_and_odd_cases() -> None:
    """What the official classes crash on works: no shared experts as None, no interleaving."""
    moe = DIFFMOE["MoE_config"] | {"interleave": False, "n_shared_experts": None}
    for name in ("DiffMoE", "TCDiT", "ECDiT"):
        model = build_official(f"models.models_{name}.DiT", DIFFMOE | {"MoE_config": moe})
        assert all(hasattr(block.mlp, "router") for block in model.blocks)
        out = randomize(model)(*random_inputs(model))
        assert out.isfinite().all()
    assert build_official("models.models_DiffMoE.DiT", DIFFMOE).config.capacity_loss_weight == 0.01
    weighted = build_official("models.models_DiffMoE.DiT", DIFFMOE | {"CapacityPred_loss_weight": 1})
    assert weighted.config.capacity_loss_weight == 1 and weighted.config.inference == "pool"


def test_shared_experts_have_the_official_widths() -> None:
    moe = DIFFMOE["MoE_config"] | {"n_shared_experts": 2}
    expected = {"DiffMoE": ("fc1.weight", 8 * 48), "TCDiT": ("gate_proj.weight", 96), "ECDiT": ("gate_proj.weight", 96)}
    for name, (key, width) in expected.items():
        state = official_state_dict(build_official(f"models.models_{name}.DiT", DIFFMOE | {"MoE_config": moe}))
        assert state[f"blocks.1.mlp.shared_experts.{key}"].shape == (width, 48)


@pytest.mark.parametrize("stages", [{"capacity_schedule_stage_I_iters": 10}, True])
def test_a_capacity_schedule_without_its_stages(stages) -> None:
    moe = DIFFMOE["MoE_config"] | {"capacity_schedule": stages}
    with pytest.raises(ValueError, match="capacity_schedule: expected capacity_schedule_stage_I_iters and"):
        build_official("models.models_DiffMoE.DiT", DIFFMOE | {"MoE_config": moe})


def test_capacity_schedule_of_an_official_file() -> None:
    stages = {"capacity_schedule_stage_I_iters": 10, "capacity_schedule_stage_II_iters": 30}
    moe = DIFFMOE["MoE_config"] | {"capacity_schedule": stages}
    model = build_official("models.models_DiffMoE.DiT", DIFFMOE | {"MoE_config": moe})
    factors = {}
    for step in (0, 10, 20, 30, 1000):
        model.set_training_step(step)
        factors[step] = model.blocks[1].mlp.capacity_factor
    assert factors == {0: 4, 10: 4, 20: 2.5, 30: 1, 1000: 1}


JIT = load_case("model_jit_moe").config["ctor"]


def test_jit_odd_cases() -> None:
    dense = build_official("model_jit.JiT", JIT | {"moe_config": None})
    assert dense.config.num_experts == 0 and dense.null_label == 10
    plain = build_official("model_jit.JiT", JIT | {"moe_config": JIT["moe_config"] | {"interleave": False}})
    assert plain.config == dense.config, "officially all blocks are dense without interleaving"
    for change, message in (
        ({"in_context_start": 4}, "^in_context_start: expected a block, 0 to 3, got 4"),
        ({"proj_drop": 0.1}, "proj_drop: expected 0"),
        ({"bottleneck": 3}, "bottleneck: unknown parameter; did you mean 'bottleneck_dim'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_official("model_jit.JiT", JIT | change)
