"""Which experts a trained model uses: `python -m benchmarks.analyze --ckpt runs/train --output analysis`.

Draws images and records the routing of every MoE layer at each call of the sampler, as DiffMoE (arXiv:2503.14487),
EC-DiT (arXiv:2410.02098) and DSMoE plot it: experts by class and by time of sampling, load by layer, and the capacity
that DiffMoE predicts. Under guidance the conditional half counts; the unconditional one is a curve of capacity.png.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.analysis.figures import save_capacity, save_experts_by_class, save_experts_by_time, save_load
from benchmarks.analysis.usage import ExpertUsage, LayerLoad, UsageRecorder, layer_loads
from diffmoe_kernels import ExpertChoiceMoE
from models.data import check_labels
from models.markdown import markdown_table
from models.objectives import DDPM, Method, Objective
from models.options import build_config, command_line, config_parser, option, require
from models.precision import weights_cast_once
from models.sample import SamplerConfig
from models.sampling import balanced_labels
from models.training.loading import TrainedModel
from models.training.logs import machine

ARRAYS = {  # of analysis.npz
    "blocks": "(L,) the blocks that the MoE layers stand in",
    "classes": "(C,) the classes that were sampled",
    "times": "(S,) times at which the sampler called the model, in its order",
    "rows_by_class": "(L, C, E) tokens of a class that went to an expert, conditional half",
    "tokens_by_class": "(L, C) tokens of a class that the layer saw",
    "rows_by_time": "(L, 2, S, E) tokens that went to an expert; conditional and unconditional half",
    "tokens_by_time": "(L, 2, S) tokens that the layer saw",
    "load": "(L, E) an expert's share of its layer's routed tokens; NaN where there are none",
    "capacity_by_class": "(L, C) experts per token",
    "capacity_by_time": "(L, 2, S) experts per token; NaN where a half was not computed",
}
EVEN = "even by construction: every expert takes equally many tokens of each sample"


@dataclass(frozen=True)
class AnalyzeConfig(SamplerConfig):
    """All options of `python -m benchmarks.analyze`; see `SamplerConfig`."""

    output: str = option("analysis", "directory for the pictures, analysis.md, analysis.json and analysis.npz")
    num_samples: int = option(100, "how many images, as many of each class; spread over them if there are fewer")
    method: Method | None = option(None, "sampler of fixed times: euler, heun; for ddpm ancestral, ddim")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "method", self.method != "dopri5", "a sampler of fixed times, such as euler or heun")


def record_usage(trained: TrainedModel, config: AnalyzeConfig) -> ExpertUsage:
    """Draws `config.num_samples` images, those of `models.sample` with the same options, and counts their routing.

    Raises:
        TypeError, ValueError: a model without experts, labels out of range, or a request that the model can't meet.
    """
    model = trained.model
    recorder = UsageRecorder(model)
    classes = list(range(model.num_classes)) if config.classes is None else config.classes
    check_labels(torch.tensor(classes), model.num_classes)
    # Fewer images than classes are every so many'th class, not the first ones.
    labels = balanced_labels(config.num_samples, classes[:: math.ceil(len(classes) / config.num_samples)])
    batches = config.draw(trained, labels)
    with recorder, weights_cast_once(model, config.precision):
        for part in labels.split(config.batch_size):
            recorder.start_batch(len(part))
            if not next(batches).isfinite().all():
                raise ValueError("images hold NaN or infinity: the model diverged, and its routing says nothing")
    return recorder.usage()


def format_table(loads: Sequence[LayerLoad]) -> str:
    """The layers as a Markdown table."""
    heading = ["block", "load CV", "max / mean", "busiest expert", "least busy", "unused experts", "experts per token"]
    rows = [
        [
            f"{load.block}",
            f"{load.cv:.3f}",
            f"{load.max_over_mean:.2f}",
            f"{load.largest_share:.2%}",
            f"{load.smallest_share:.2%}",
            f"{load.dead_experts}",
            f"{load.experts_per_token:.3f}",
        ]
        for load in loads
    ]
    return markdown_table(heading, rows)


def analyze(config: AnalyzeConfig) -> str:
    """Runs it all, writes the files into `config.output` and returns the table with what it was made from.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, TypeError, ValueError: as `SamplerConfig.load` and `record_usage` do.
    """
    trained = config.load()
    usage = record_usage(trained, config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    about, time_label = _about(trained, config, usage), _time_label(trained.objective)
    notes = [EVEN] if _is_even(trained.model) else []
    title = "\n".join([about, *notes])
    save_experts_by_class(output / "experts_by_class.png", usage, title)
    save_experts_by_time(output / "experts_by_timestep.png", usage, title, time_label)
    save_load(output / "load.png", usage, title)
    capacity = _predicted_capacity(trained)
    if capacity is not None:
        save_capacity(output / "capacity.png", usage, title, time_label, capacity)

    loads = layer_loads(usage)
    command = command_line("benchmarks.analyze", config, {"output"})
    origin = f"{about}. `{command}`, {machine(next(trained.model.parameters()).device)}"
    text = "\n\n".join([format_table(loads), *notes, origin])
    (output / "analysis.md").write_text(f"{text}\n")
    np.savez(output / "analysis.npz", **{name: getattr(usage, name) for name in ARRAYS})
    record = {
        "origin": origin,
        "config": dataclasses.asdict(config),
        "layers": [_without_nan(dataclasses.asdict(load)) for load in loads],
        "arrays": ARRAYS,
    }
    (output / "analysis.json").write_text(json.dumps(record, indent=2) + "\n")
    return text


def _about(trained: TrainedModel, config: AnalyzeConfig, usage: ExpertUsage) -> str:
    guidance = f", guidance {config.cfg_scale:g} (conditional half)" if config.cfg_scale != 1.0 else ""
    return (
        f"{type(trained.model).__name__}: MoE layers {len(usage.blocks)}, experts {usage.num_experts}, images "
        f"{config.num_samples}, classes {len(usage.classes)}, times of sampling {len(usage.times)}{guidance}"
    )


def _time_label(objective: Objective) -> str:
    return "diffusion step (999 is noise)" if isinstance(objective, DDPM) else "time t (0 is noise, 1 is data)"


def _is_even(model: nn.Module) -> bool:
    """Whether experts choose among each sample's tokens (EC-DiT), so that neither class nor time can change a load."""
    return any(isinstance(module, ExpertChoiceMoE) and module.pool == "sample" for module in model.modules())


def _predicted_capacity(trained: TrainedModel) -> float | None:
    """Experts per token in training, where the capacity at inference is predicted; else None."""
    for module in trained.model.modules():
        if isinstance(module, ExpertChoiceMoE) and module.capacity_predictor is not None:
            return module.capacity_factor
    return None


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """NaN as None, since JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 2 where it asks for something impossible."""
    try:
        parser = config_parser(
            AnalyzeConfig, prog="python -m benchmarks.analyze", description="Which experts a trained model uses."
        )
        config = build_config(AnalyzeConfig, parser.parse_args(arguments))
        text = analyze(config)
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\n\nPictures and arrays: {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
