"""From a model's name and a dataset to a model, and from a checkpoint back to the model it was written from."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from models import create_model
from models.checkpoint import build_official, load_official
from models.data import DataSplits
from models.objectives import Objective, objective_for
from models.options import read_yaml
from models.training.checkpoints import CheckpointError, load_checkpoint, load_newest

Weights = Literal["ema", "ema2", "model"]
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class TrainedModel:
    """What sampling needs of a run.

    model: in evaluation mode.
    objective: the one it was trained with.
    autoencoder: local path or hub name of the autoencoder whose latents the model makes; None for pixels.
    """

    model: nn.Module
    objective: Objective
    autoencoder: str | None


def pick_device(name: str) -> torch.device:
    """The device of "auto" (the GPU if there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where torch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but torch finds no GPU: pass --device cpu, or install a CUDA build of torch"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def compile_blocks(model: nn.Module) -> None:
    """Compiles a model block by block, for each size of batch: those of one kind share that, a whole takes minutes."""
    # For grad and no grad, batches, guided ones and the last, each with a first block of its own; past the limit, 8,
    # torch.compile runs eager without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for block in model.blocks:
        block.compile(dynamic=False)


def model_overrides(options: dict[str, Any], data: DataSplits) -> dict[str, Any]:
    """`options` for `create_model`, with image size, channels and classes taken from the data.

    Raises:
        ValueError: an option contradicts the data.
    """
    geometry = {"input_size": data.image_size, "in_channels": data.channels, "num_classes": data.num_classes}
    for name, value in geometry.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"model_options sets {name}={options[name]!r}, but the dataset {data.name!r} has {value}: "
                f"leave {name} out, it is taken from the data, or choose other --data"
            )
    return {**options, **geometry}


def trainable_model(name: str, overrides: dict[str, Any]) -> nn.Module:
    """`create_model`; where labels are never dropped in training there is no label of no class: guidance is refused.

    JiT has an embedding for that all the same, which official checkpoints bring and training would leave at random.
    """
    model = create_model(name, **overrides)
    if model.config.class_dropout_prob == 0:
        model.y_embedder.null_label = None
    return model


def check_forward(name: str, overrides: dict[str, Any], batch_size: int) -> None:
    """Refuse, before anything is made, a batch that the model can't take: a capacity under one token.

    Raises:
        ValueError: as the model says.
    """
    with torch.device("meta"), torch.no_grad():
        model = trainable_model(name, overrides).train()
        images = torch.empty(batch_size, model.in_channels, model.input_size, model.input_size)
        model(images, torch.zeros(batch_size), torch.zeros(batch_size, dtype=torch.int64))


def check_model_config(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of a model with another config than `model`, naming the field and both values."""
    saved, now = state["model_config"], dataclasses.asdict(model.config)
    for name in sorted((saved.keys() | now.keys()) - {"backend"}):  # which changes nothing that was learned
        if saved.get(name) != now.get(name):
            raise CheckpointError(
                f"{path} holds a {state['model_name']} with {name}={saved.get(name)!r}, but this one has "
                f"{name}={now.get(name)!r}: use the version and options that the checkpoint was trained with"
            )


def load_trained(
    checkpoint: Path | str,
    *,
    weights: Weights = "ema",
    name: str | None = None,
    objective_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> TrainedModel:
    """The trained model of a run directory or checkpoint file, and the objective that it was trained with.

    Args:
        checkpoint: a run directory of `models.train`, for its newest readable checkpoint, or one checkpoint file.
        weights: "ema" for the moving average, "ema2" for a second one, "model" for the weights of the last step.
        name: the model's name, where a checkpoint of any other shall be refused.
        objective_options: settings of the objective to change, such as JiT's `guidance_interval`.
        device: where the model goes.

    Raises:
        CheckpointError: (a ValueError) nothing readable there, or a checkpoint of another model or config.
        ValueError: settings that the objective does not have.
    """
    path, state = _read(Path(checkpoint))
    if name is not None and name != state["model_name"]:
        raise CheckpointError(
            f"{path} is a checkpoint of {state['model_name']}, not of {name}: ask for {state['model_name']}, "
            "or pass the checkpoint of another run"
        )
    if state.get(weights) is None:
        raise CheckpointError(
            f"{path} holds no {weights!r} weights: its run had no --ema-decay2; ask for 'ema' or 'model'"
        )
    # A run on a GPU's kernels is sampled on any machine.
    model = trainable_model(state["model_name"], {**state["model_overrides"], "backend": "auto"})
    check_model_config(model, state, path)
    load_weights(model, state[weights], path)
    options = state["train_config"]
    settings = {**options.get("objective_options", {}), **(objective_options or {})}
    objective = objective_for(model, options.get("objective", "auto"), **settings)
    return TrainedModel(model.to(device).eval(), objective, state.get("autoencoder"))


def load_published(checkpoint: Path | str, official: Path, *, weights: Weights | None = None) -> nn.Module:
    """An official model with the weights of a file as its authors publish it, in float32 and evaluation mode.

    Args:
        checkpoint: see `models.checkpoint.load_official`.
        official: YAML file with `target` and `params`, at its top or under `model`, as `build_official` takes them.
        weights: as `load_official` has them; the first of "ema", "ema2" and "model" that is there where None.

    Raises:
        OSError: no such file.
        ValueError: files that can't be read, or that do not fit each other.
    """
    content = read_yaml(official)
    content = content.get("model", content)
    if not isinstance(content, dict) or not {"target", "params"} <= content.keys():
        raise ValueError(f"{official} must name the official model's target and params, at its top or under model")
    model = build_official(content["target"], content["params"])
    return load_official(model, checkpoint, weights=weights, dtype=torch.float32).eval()


def load_model(checkpoint: Path | str, **arguments: Any) -> nn.Module:
    """The model of `load_trained`, which has the arguments."""
    return load_trained(checkpoint, **arguments).model


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """`model.load_state_dict`, strict, with the file in the message where names or shapes do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model, it is damaged or of another version: {error}") from error


def _read(source: Path) -> tuple[Path, dict[str, Any]]:
    if not source.is_dir():
        return source, load_checkpoint(source)
    found = load_newest(source)
    if found is None:
        raise CheckpointError(f"{source} holds no checkpoint: pass the --output of a `python -m models.train` run")
    return found
