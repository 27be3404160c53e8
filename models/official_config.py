"""Official YAML configurations to ours."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from models import DiffMoEConfig, DiT, DiTConfig, DSMoEConfig, ECDiTConfig, JiTConfig, TCDiTConfig, model_class

# Refused where true: bugs or kernels that this project does not take over.
_REFUSED = {
    "use_sinks": "attention sinks (the official code attends over the batch axis)",
    "use_kda": "Kimi delta attention",
    "use_flash_attn": "its flash attention variant",
}
# Read by the official constructors and without any effect there, or only on the initial weights.
_IGNORED = {"sliding_window", "kda_kwargs", "init_MoeMLP", "use_capacity_schedule", "pretraining_tp"}
_IGNORED_MOE = {"hidden_size", "capacity", "capacity_schedule", "skip_last2", "use_type", "group_bins", "local_top_p"}
_DSMOE_FIELDS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_group": "num_groups",
    "topk_group": "top_groups",
    "routed_scaling_factor": "scaling_factor",
    "interleave": "interleave",
}
_DIT_FIELDS = (
    *("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "head_dim", "mlp_ratio"),
    *("class_dropout_prob", "num_classes", "learn_sigma"),
)

# By our fields, whose names the messages of models have.
_OFFICIAL_NAMES = {ours: official for official, ours in _DSMOE_FIELDS.items()} | {
    **{"rope": "rope_type", "norm": "norm_type", "capacity_factor": "capacity", "expert_dropout": "proj_drop"},
    **{"bottleneck_size": "bottleneck_dim", "num_context_tokens": "in_context_len"},
    **{"context_start": "in_context_start", "num_dense_blocks": "skip_first2"},
}


def build_official(target: str, params: Mapping[str, Any]) -> DiT:
    """Builds the model of an official YAML file, with the official behaviour as the default.

    Args:
        target: the YAML's ``model.target``, such as "models.models_DSMoE.DiT"; "model_jit.JiT" for JiT and JiTMoE.
        params: the YAML's ``model.params``, JiT's keyword arguments; ``MoE_config`` a mapping. What is
            missing has the official class's default. A masked router group is filled with 0.0 as there
            (`ops.router_topk`).

    Raises:
        ValueError: an unknown target or parameter (the nearest is named), a required one that is missing, one that is
            refused, or values of another type or that do not fit each other; by the official names.
    """
    if target not in _TARGETS:
        raise ValueError(f"target: expected one of {', '.join(_TARGETS)}, got {target!r}{_hint(str(target), _TARGETS)}")
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected the mapping under the YAML's target, got {params!r}")
    try:
        config = _TARGETS[target](dict(params))
        return model_class(config)(config)
    except (TypeError, ValueError) as error:
        field, colon, what = str(error).partition(":")
        names = {**_OFFICIAL_NAMES, "top_k": "capacity"} if target == "models.models_TCDiT.DiT" else _OFFICIAL_NAMES
        raise ValueError(f"{names.get(field, field)}{colon}{what}") from error


def _dit_config(params: dict[str, Any]) -> DiTConfig:
    return DiTConfig(**_take_dit_fields(params), swiglu=bool(_take_rest(params, "use_swiglu").get("use_swiglu", False)))


def _dsmoe_config(params: dict[str, Any]) -> DSMoEConfig:
    fields = _take_dit_fields(params)
    mixture, moe = _take_mixture(params, _DSMOE_FIELDS)
    dense = moe.pop("skip_first2", None) or False  # a flag that means two blocks, or a number of blocks
    if not isinstance(dense, int):
        raise ValueError(f"MoE_config.skip_first2: expected a flag or a number of blocks, got {dense!r}")
    shared = moe.pop("use_shared_expert", True)
    _refuse(moe)
    _check_known("MoE_config.", set(moe) - _IGNORED_MOE, [*_DSMOE_FIELDS, "skip_first2", "use_shared_expert"])
    params.pop("use_swiglu", None)  # its dense MLP is SiLU whatever this says
    params.pop("CapacityPred_loss_weight", None)  # it has no such loss
    rest = _take_rest(params, "rope_type", "enable_gqa", "norm_type")
    if rest.get("enable_gqa"):
        if fields.get("head_dim") is not None:
            raise ValueError("enable_gqa: expected no head_dim beside it, the official code can't build that")
        fields["num_kv_heads"] = fields.get("num_heads", DSMoEConfig.num_heads) // 2
    rope = rest.get("rope_type", "none")
    return DSMoEConfig(
        **fields,
        **mixture,
        num_dense_blocks=2 * dense if isinstance(dense, bool) else dense,
        shared_expert=shared,
        rope=None if rope == "none" else rope,
        norm=rest.get("norm_type", "layernorm"),
        masked_group_fill=0.0,
    )


def _diffmoe_config(params: dict[str, Any]) -> DiffMoEConfig:
    fields, mixture, num_shared, schedule = _take_baseline(params, "capacity_factor")
    stages = None
    if schedule:
        names = [f"capacity_schedule_stage_{stage}_iters" for stage in ("I", "II")]
        if not isinstance(schedule, Mapping) or not set(names) <= schedule.keys():
            raise ValueError(f"capacity_schedule: expected {' and '.join(names)}, got {schedule!r}")
        stages = tuple(schedule[name] for name in names)
    rest = _take_rest(params, "use_swiglu", "CapacityPred_loss_weight")
    return DiffMoEConfig(
        **fields,
        **mixture,
        shared_expert=num_shared > 0,
        swiglu=bool(rest.get("use_swiglu", False)),
        capacity_loss_weight=rest.get("CapacityPred_loss_weight", 0.01),
        capacity_schedule=stages,
    )


def _ecdit_config(params: dict[str, Any]) -> ECDiTConfig:
    fields, mixture, num_shared, _ = _take_baseline(params, "capacity_factor")
    swiglu = bool(_take_rest(params, "use_swiglu").get("use_swiglu", False))
    return ECDiTConfig(**fields, **mixture, num_shared_experts=num_shared, swiglu=swiglu)


def _tcdit_config(params: dict[str, Any]) -> TCDiTConfig:
    fields, mixture, num_shared, _ = _take_baseline(params, "top_k")
    swiglu = bool(_take_rest(params, "use_swiglu").get("use_swiglu", False))
    return TCDiTConfig(**fields, **mixture, num_shared_experts=num_shared, swiglu=swiglu)


def _jit_config(params: dict[str, Any]) -> JiTConfig:
    for name in ("attn_drop", "proj_drop"):
        if params.pop(name, 0.0):
            raise ValueError(f"{name}: expected 0, dropout in JiT's dense layers is not supported")
    renamed = {"bottleneck_dim": "bottleneck_size", "in_context_len": "num_context_tokens"}
    renamed["in_context_start"] = "context_start"
    fields = {ours: params.pop(official) for official, ours in renamed.items() if official in params}
    known = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
    fields |= {name: params.pop(name) for name in known if name in params}
    mixture: dict[str, Any] = {}
    if params.get("moe_config") is not None:
        params["MoE_config"] = params.pop("moe_config")
        required = {**_DSMOE_FIELDS, "use_shared_expert": "shared_expert", "proj_drop": "expert_dropout"}
        mixture, moe = _take_mixture(params, required)
        _check_known("moe_config.", set(moe) - _IGNORED_MOE, list(required))
        if not mixture.pop("interleave"):  # officially all blocks are dense then
            mixture = {}
    params.pop("moe_config", None)
    _check_known("", set(params), [*known, *renamed, "moe_config"])
    # The official denoiser drops the labels, and fills masked groups with 0.0.
    return JiTConfig(**fields, **mixture, class_dropout_prob=0.0, masked_group_fill=0.0)


def _take_baseline(
    params: dict[str, Any], capacity: str
) -> tuple[dict[str, Any], dict[str, Any], int, Mapping[str, int] | None]:
    """DiT's fields, the mixture's with its capacity named ``capacity``, the shared experts, the capacity schedule."""
    fields = _take_dit_fields(params)
    required = {"num_experts": "num_experts", "capacity": capacity, "interleave": "interleave"}
    mixture, moe = _take_mixture(params, required)
    num_shared = moe.pop("n_shared_experts", 0) or 0
    schedule = moe.pop("capacity_schedule", None)
    _refuse(moe)
    _check_known("MoE_config.", set(moe) - _IGNORED_MOE, [*required, "n_shared_experts", "capacity_schedule"])
    return fields, mixture, num_shared, schedule


def _take_mixture(params: dict[str, Any], required: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pops MoE_config: (our fields of the required keys, what else it holds)."""
    moe = params.pop("MoE_config", None)
    if not isinstance(moe, Mapping):
        raise ValueError(f"MoE_config: expected a mapping, got {moe!r}")
    moe = dict(moe)
    missing = [name for name in required if name not in moe]
    if missing:
        raise ValueError(f"MoE_config: expected {', '.join(missing)}, which the official code requires")
    if moe.pop("init_MoeMLP", False):
        raise ValueError("MoE_config.init_MoeMLP: expected False, the official code can't be built with True")
    return {ours: moe.pop(official) for official, ours in required.items()}, moe


def _take_dit_fields(params: dict[str, Any]) -> dict[str, Any]:
    """Pops the fields that every DiT has, by the official name, which is ours too."""
    return {name: params.pop(name) for name in _DIT_FIELDS if name in params}


def _take_rest(params: dict[str, Any], *names: str) -> dict[str, Any]:
    """The remaining parameters, which must be ``names``, without effect, or refused."""
    _refuse(params)
    _check_known("", set(params) - _IGNORED, [*names, *_DIT_FIELDS])
    return params


def _refuse(params: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if params.pop(name, False):
            raise ValueError(f"{name}: expected False, {what} is not supported, got True")


def _check_known(prefix: str, names: set[str], known: list[str]) -> None:
    for name in sorted(names - set(known)):
        raise ValueError(f"{prefix}{name}: unknown parameter{_hint(name, known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; did you mean {near[0]!r}?" if near else ""


_TARGETS: dict[str, Callable[[dict[str, Any]], DiTConfig]] = {
    "models.models_DiT.DiT": _dit_config,
    "models.models_DSMoE.DiT": _dsmoe_config,
    "models.models_DiffMoE.DiT": _diffmoe_config,
    "models.models_TCDiT.DiT": _tcdit_config,
    "models.models_ECDiT.DiT": _ecdit_config,
    "model_jit.JiT": _jit_config,
}
