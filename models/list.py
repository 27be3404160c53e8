"""``python -m models.list``: every model with its sizes, as a Markdown table; nothing is allocated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from models import CONFIGS, count_parameters, create_model
from models.markdown import markdown_table

HEADING = (
    "model",
    "total (M)",
    "activated (M)",
    "depth",
    "width",
    "heads",
    "experts",
    "expert width",
    "top-k, capacity",
)


def model_table() -> str:
    """Parameters in millions, frozen position tables included; activated is what one token uses."""
    rows = []
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            total, activated = count_parameters(create_model(name))
        sizes = [config.depth, config.hidden_size, config.num_heads]
        if getattr(config, "num_experts", 0):
            width = getattr(config, "moe_intermediate_size", int(config.hidden_size * config.mlp_ratio))
            used = config.top_k if hasattr(config, "top_k") else f"capacity {config.capacity_factor:g}"
            sizes += [config.num_experts, width, used]
        row = [name, f"{total / 1e6:.2f}", f"{activated / 1e6:.2f}", *map(str, sizes)]
        rows.append(row + [""] * (len(HEADING) - len(row)))
    return markdown_table(HEADING, rows, right=HEADING[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    about = "Every model with its sizes, parameters in millions; activated is what one token uses."
    argparse.ArgumentParser(prog="python -m models.list", description=about).parse_args(arguments)
    print(model_table())


if __name__ == "__main__":
    main()
