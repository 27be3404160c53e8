"""Train a model: `python -m models.train --model DSMoE-digits --data digits --output runs/dsmoe`."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from models.options import build_config, config_parser, read_yaml
from models.training.config import TrainConfig
from models.training.trainer import CONFIG_FILE, NonFiniteError, Trainer

DESCRIPTION = """Train a diffusion transformer, in a run directory of its own. Ctrl-C stops it with
a checkpoint; --resume goes on from there with the run's own options."""


def parse(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, bool]:
    """The options of a command line, and whether to resume; a resumed run's own options are its defaults."""
    parser = config_parser(TrainConfig, prog="python -m models.train", description=DESCRIPTION)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parsed = parser.parse_args(arguments)
    saved = Path(parsed.output) / CONFIG_FILE
    if parsed.resume and saved.exists():
        options = read_yaml(saved)
        if unknown := options.keys() - {spec.name for spec in dataclasses.fields(TrainConfig)}:
            raise ValueError(
                f"{saved} has options that this version does not: {', '.join(sorted(unknown))}; remove them"
            )
        parser.set_defaults({**options, "output": parsed.output})
        parsed = parser.parse_args(arguments)
    return build_config(TrainConfig, parsed), parsed.resume


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 where training ended as asked, by Ctrl-C too."""
    try:
        config, resume = parse(arguments)
        trainer = Trainer(config, resume=resume)
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = trainer.fit()
    except (NonFiniteError, NotImplementedError, OSError, ValueError) as error:  # weights, a backend, an image, a disk
        print(f"error: {error}", file=sys.stderr)
        return 1

    print(f"{config.model}: step {result.step}, ended by {result.ended_by}; newest checkpoint {result.checkpoint}")
    if result.ended_by == "signal":
        print(f"continue with: python -m models.train --resume --output {shlex.quote(config.output)}")
    else:
        print(f"samples in {trainer.run / 'samples'}, loss curve {trainer.run / 'loss.png'}")
        print(f"sample more: python -m models.sample --checkpoint {shlex.quote(config.output)} --output samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
