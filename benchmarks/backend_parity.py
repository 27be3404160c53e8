"""Training on the kernels against training on the reference, in bfloat16: `python -m benchmarks.backend_parity`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.parity.backends import SEEDS, WINDOW, Measure, blobs, compare_backends
from diffmoe_kernels.backend import Backend
from models import create_model
from models.markdown import markdown_table
from models.training.logs import machine

MODELS = ["DSMoE-digits", "DiffMoE-digits", "JiTMoE-digits"]
BATCH_SIZE = 64
NOTES = f"""distance: between the backend and the reference, both of seed {SEEDS[0]}.
spread: between the reference's seeds {SEEDS}; of the final loss the greatest less the least, else of the nearest two.
final loss: mean of the last {WINDOW} steps. loss curve: mean difference of the running means over {WINDOW} steps.
prediction: relative distance of what the averaged weights predict. Parity is to be within the spread in all three."""


def format_report(found: dict[str, list[Measure]]) -> str:
    """The measures of each model as a Markdown table."""
    rows = [
        [model, one.name, f"{one.distance:.2e}", f"{one.spread:.2e}", "within" if one.passes else "**beyond**"]
        for model, measures in found.items()
        for one in measures
    ]
    return markdown_table(["model", "measure", "distance", "spread", "verdict"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a distance is beyond its spread, 2 for bad options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backend_parity", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"digits models, {' '.join(MODELS)} by default")
    parser.add_argument("--steps", type=int, default=200, help="training steps of every run")
    parser.add_argument("--backend", help="that is compared; triton on a GPU and torch on a CPU by default")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers; none is written without")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = options.backend or ("triton" if device.type == "cuda" else "torch")
    batches = [(images.to(device), labels.to(device)) for images, labels in blobs(options.steps, BATCH_SIZE)]
    found = {}
    try:
        if options.output is not None:  # before the work: where nothing can be written is told at once
            options.output.parent.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            print(f"{model}: {options.steps} steps, {len(SEEDS) + 1} times", flush=True)
            make_model = partial(_make_model, model)
            found[model] = compare_backends(make_model, batches, backend=backend)
    except (NotImplementedError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = (
        f"Backend {backend!r} against 'reference', {options.steps} steps of {BATCH_SIZE} images in bfloat16 autocast"
    )
    about = f"{about}, {machine(device)}."
    if backend != "triton":
        about += "\nThis says nothing about the kernels: those are the backend 'triton', on a GPU."
    print(f"\n{format_report(found)}\n\n{about}\n{NOTES}")
    if options.output is not None:
        measures = {model: [dataclasses.asdict(one) for one in found[model]] for model in found}
        options.output.write_text(json.dumps({"about": about, "models": measures}, indent=2) + "\n")
    return 0 if all(one.passes for measures in found.values() for one in measures) else 1


def _make_model(name: str, backend: Backend) -> nn.Module:
    return create_model(name, backend=backend)


if __name__ == "__main__":
    sys.exit(main())
