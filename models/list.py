"""``python -m models.list``: every model with its total and activated parameters."""

from __future__ import annotations

import torch

from models import CONFIGS, count_parameters, create_model


def main() -> None:
    print(f"{'model':<16}{'total (M)':>12}{'activated (M)':>16}{'depth':>8}{'width':>8}{'heads':>8}")
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            total, activated = count_parameters(create_model(name))
        sizes = f"{config.depth:>8}{config.hidden_size:>8}{config.num_heads:>8}"
        print(f"{name:<16}{total / 1e6:>12.2f}{activated / 1e6:>16.2f}{sizes}")


if __name__ == "__main__":
    main()
