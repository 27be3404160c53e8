"""Official configurations and state dicts to ours, and back.

Official files: DiT (github.com/facebookresearch/DiT), DSMoE and JiTMoE (github.com/yhlleo/EfficientMoE). Their keys are
ours but for the MoE layers: experts lie there one by one, and gate and up apart.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe_kernels import ExpertChoiceMoE, MoE
from diffmoe_kernels.modules import Experts, FeedForward, TopKRouter
from models.official_config import build_official

__all__ = ["build_official", "load_official", "official_state_dict", "read_checkpoint"]

# weights= -> the entries of a checkpoint file that may hold them, DiT's and DSMoE's name first, then JiT's.
_ENTRIES = {"ema": ("ema", "model_ema1"), "ema2": ("model_ema2",), "model": ("model",)}
_PREFIXES = ("module.", "net.", "_orig_mod.")  # DistributedDataParallel, JiT's denoiser, torch.compile
_BUFFERS = {"expert_bias": "e_score_correction_bias", "threshold_decay": "ema_decay"}
_CHILDREN = {"router": "gate", "shared_expert": "shared_experts"}  # of a mixture
# What activation checkpointing and torch.compile put around a layer: the child's name, and its part in our keys.
_WRAPPERS = {"_checkpoint_wrapped_module": "", "_orig_mod": "_orig_mod."}
_MOST_LINES = 10  # of each kind in an error message


@dataclass(frozen=True)
class _Piece:
    """Where an official tensor lies in ours: ``state_dict[key][index]``."""

    key: str
    index: tuple[int | slice, ...] = ()


def load_official(
    model: nn.Module,
    source: Mapping[str, Any] | str | os.PathLike[str],
    *,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Loads weights with official keys, strictly: all or nothing.

    Args:
        model: a model of `build_official` or `create_model`, or one of its layers (`MoE`, `RoPEAttention`). May be on
            the meta device; it is then on the tensors' device.
        source: a state dict with official keys, a checkpoint {"ema": ..., "model": ...}, or a file of either: .pt and
            .pth (nothing in them is executed) or .safetensors. Leading ``module.``, ``net.`` and ``_orig_mod.`` of
            keys are removed.
        weights: which entry of a checkpoint: "ema" (JiT: ``model_ema1``), "ema2" (JiT: ``model_ema2``) or "model"; the
            first of these that is there where None.
        dtype: cast floating tensors to it; where None the checkpoint's dtype is kept, so that half-precision files give
            half-precision parameters.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that can't be read, an entry that is not there, keys that are missing or too many, shapes
            that differ; the message names the keys and both shapes. The model is unchanged then.
    """
    if isinstance(source, str | os.PathLike):
        source = read_checkpoint(source)
    official = _strip_prefixes(_pick_weights(source, weights))
    inner = _without_compile(model)
    layout, ours = dict(_layout(inner)), inner.state_dict()
    _check_keys(official, layout, ours)
    loaded: dict[str, Tensor] = {}
    for official_key, piece in layout.items():
        tensor = official[official_key]
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if piece.key not in loaded:
            target = ours[piece.key]
            device = tensor.device if target.is_meta else target.device
            loaded[piece.key] = torch.empty(target.shape, dtype=kind, device=device)
        if loaded[piece.key].dtype != kind:
            raise ValueError(
                f"{official_key}: expected {loaded[piece.key].dtype} as the other tensors of {piece.key}, got {kind}; "
                "pass dtype="
            )
        loaded[piece.key][piece.index] = tensor.to(kind)
    for key, tensor in loaded.items():
        _assign(inner, key, tensor)
    for module in inner.modules():
        # What is not in the file, and left behind on the meta device otherwise.
        if hasattr(module, "reset_tables"):
            module.reset_tables()
        if isinstance(module, TopKRouter) and module.expert_bias.is_meta:
            module.expert_bias = torch.zeros_like(module.expert_bias, device=module.weight.device)
    return model


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with official keys: the same values, shapes and dtypes as were loaded, detached copies.

    Args:
        model: as for `load_official`. It is read as it stands, so that a model whose parameters were replaced by their
            gradients gives the gradients by official names.
    """
    model = _without_compile(model)
    ours = model.state_dict()
    return {key: ours[piece.key][piece.index].detach().clone() for key, piece in _layout(model)}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a .safetensors or a torch file without executing code from it (``argparse.Namespace`` is allowed).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated or damaged file, or one that holds other objects than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: can't be loaded safely; it is damaged, or holds objects other than tensors, plain values and "
            "argparse.Namespace, which would need code to run"
        ) from error
    except Exception as error:  # safetensors, zip and pickle errors have no common class
        raise ValueError(f"{path}: not a whole checkpoint file, truncated or of another format: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict or a checkpoint, got {type(content).__name__}")
    return content


def _without_compile(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # what torch.compile wraps


def _pick_weights(source: Mapping[str, Any], weights: str | None) -> Mapping[str, Tensor]:
    if weights is not None and weights not in _ENTRIES:
        raise ValueError(f"weights: expected one of {', '.join(map(repr, _ENTRIES))} or None, got {weights!r}")
    if source and all(isinstance(value, Tensor) for value in source.values()):
        if weights is not None:
            raise ValueError(f"weights: expected None for a plain state dict, got {weights!r}")
        return source
    wanted = _ENTRIES[weights] if weights else [entry for entries in _ENTRIES.values() for entry in entries]
    for entry in wanted:
        if isinstance(source.get(entry), Mapping):
            return source[entry]
    odd = [str(key) for key, value in source.items() if not isinstance(value, Tensor)]
    there = ", ".join(str(key) for key in list(source)[:20]) or "nothing"
    if len(odd) < len(source):
        there = f"tensors beside what is none: {', '.join(odd[:20])}"
    raise ValueError(f"weights: expected a checkpoint with {' or '.join(wanted)}, found {there}")


def _strip_prefixes(official: Mapping[str, Any]) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for name, value in official.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
        key = name
        while key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        if key in stripped:
            raise ValueError(f"{name}: the checkpoint holds {key} twice, under different prefixes")
        stripped[key] = value
    return stripped


def _check_keys(official: dict[str, Tensor], layout: dict[str, _Piece], ours: dict[str, Tensor]) -> None:
    missing, wrong, extra = [], [], []
    for key, piece in layout.items():
        expected = tuple(ours[piece.key][piece.index].shape)
        if key not in official:
            missing.append(f"missing key {key}: the model expects {expected}, the checkpoint has nothing")
        elif tuple(official[key].shape) != expected:
            found = tuple(official[key].shape)
            wrong.append(f"shape of {key}: the model expects {expected}, the checkpoint has {found}")
    for key in official.keys() - layout.keys():
        extra.append(f"extra key {key}: the model has nothing, the checkpoint has {tuple(official[key].shape)}")
    if missing or wrong or extra:
        number = len(missing) + len(wrong) + len(extra)
        lines = [line for problems in (wrong, missing, sorted(extra)) for line in _first_lines(problems)]
        raise ValueError(
            f"the checkpoint is not of this model, {number} of its keys do not fit:\n  " + "\n  ".join(lines)
        )


def _first_lines(problems: list[str]) -> list[str]:
    hidden = len(problems) - _MOST_LINES
    return problems[:_MOST_LINES] + ([f"and {hidden} more such keys"] if hidden > 0 else [])


@torch.no_grad()
def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    module = getattr(module, "_checkpoint_wrapped_module", module)  # which hands reads on, but no assignment
    current = getattr(module, name)
    if not isinstance(current, nn.Parameter):
        setattr(module, name, tensor)
    elif current.is_meta:
        setattr(module, name, nn.Parameter(tensor, requires_grad=current.requires_grad))
    else:
        current.data = tensor  # the same Parameter, so that an optimizer that holds it goes on


def _layout(module: nn.Module, ours: str = "", official: str = "") -> Iterator[tuple[str, _Piece]]:
    """(official key, where it lies in ours) for every tensor of the module's state dict."""
    while wrapper := _WRAPPERS.keys() & module._modules.keys():
        (name,) = wrapper
        module, ours = module._modules[name], ours + _WRAPPERS[name]
    if isinstance(module, FeedForward):
        yield from _network_layout(module, ours, official, ())
        return
    is_mixture = isinstance(module, MoE | ExpertChoiceMoE)
    # TC-DiT's router has no selection bias: ours keeps what it has, zeros.
    absent = "expert_bias" if getattr(module, "score_function", None) == "softmax" else None
    for name in module.state_dict(keep_vars=True):
        if "." not in name and name != absent:
            yield official + _BUFFERS.get(name, name), _Piece(ours + name)
    for name, child in module.named_children():
        if isinstance(module, ExpertChoiceMoE) and name == "router":
            yield from ((f"{official}gate_weight", piece) for _, piece in _layout(child, f"{ours}router."))
        elif isinstance(child, Experts):
            folder = "experts.blocks" if _is_dsmoe(module) else "experts"
            for expert in range(child.down_proj.shape[0]):
                yield from _network_layout(child, f"{ours}{name}.", f"{official}{folder}.{expert}.", (expert,))
        else:
            renamed = _CHILDREN.get(name, name) if is_mixture else name
            yield from _layout(child, f"{ours}{name}.", f"{official}{renamed}.")


def _is_dsmoe(module: nn.Module) -> bool:
    return isinstance(module, MoE) and module.router.score_function == "sigmoid"


def _network_layout(
    module: Experts | FeedForward, ours: str, official: str, expert: tuple[int, ...]
) -> Iterator[tuple[str, _Piece]]:
    """One feed-forward network. SwiGLU: gate_proj, up_proj, down_proj without biases (DSMoE, MoeMLP), w12 and w3 with
    them (JiT). Others: fc1 and fc2 with biases (DiffMoE, EC-DiT, TC-DiT)."""
    stacked = isinstance(module, Experts)
    weight, bias = ("", "_bias") if stacked else (".weight", ".bias")
    has_bias = (module.down_proj_bias if stacked else module.down_proj.bias) is not None
    gated = module.activation == "swiglu"
    if has_bias:
        up, down = (
            (("w12", "gate_up_proj"), ("w3", "down_proj")) if gated else (("fc1", "up_proj"), ("fc2", "down_proj"))
        )
        for theirs, name in (up, down):
            yield f"{official}{theirs}.weight", _Piece(f"{ours}{name}{weight}", expert)
            yield f"{official}{theirs}.bias", _Piece(f"{ours}{name}{bias}", expert)
        return
    if not gated:
        raise ValueError(f"no official checkpoint has networks with activation {module.activation!r} and no biases")
    width = module.down_proj.shape[2] if stacked else module.down_proj.in_features
    gate_up = f"{ours}gate_up_proj{weight}"
    yield f"{official}gate_proj.weight", _Piece(gate_up, (*expert, slice(0, width)))
    yield f"{official}up_proj.weight", _Piece(gate_up, (*expert, slice(width, 2 * width)))
    yield f"{official}down_proj.weight", _Piece(f"{ours}down_proj{weight}", expert)
