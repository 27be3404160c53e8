"""Train a model: `python -m models.train --model DSMoE-digits --data digits --output runs/dsmoe`."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from models import CONFIGS
from models.options import build_config, config_parser, read_yaml
from models.training.config import TrainConfig
from models.training.processes import process_group
from models.training.trainer import CONFIG_FILE, NonFiniteError, Trainer

LATENT_CHANNELS = 4
MANY_TOKENS = 4096  # an image, as many as the attention kernels are made for
FIRST_WEIGHTS = 0.05  # the share of an average above which samples show the initial weights
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


def notes(trainer: Trainer) -> list[str]:
    """Warnings of settings that are legal and probably not intended."""
    config, model, found = trainer.config, trainer.model.config, []
    usual, tokens = CONFIGS[config.model].in_channels, (model.input_size // model.patch_size) ** 2
    if usual == LATENT_CHANNELS != model.in_channels and "in_channels" not in config.model_options:
        size = f"{model.in_channels} x {model.input_size} x {model.input_size}"
        found.append(
            f"{config.model} usually trains on latents of {usual} channels and gets pixels here, {size}: "
            f"{tokens} tokens an image; --autoencoder encodes them"
        )
    elif tokens > MANY_TOKENS:
        found.append(
            f"an image is {tokens:,} tokens (side {model.input_size}, patches of {model.patch_size}), the published "
            "models have 256 or 1,024: another --model or a smaller --image-size trains faster"
        )
    for name in ("ema_decay", "ema_decay2"):
        decay = getattr(config, name)
        if decay is not None and (left := decay**config.steps) > FIRST_WEIGHTS:
            found.append(
                f"after {config.steps} steps {left:.0%} of the average of --{name.replace('_', '-')} {decay:g} is "
                "still the first weights: more steps or a smaller decay samples better"
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 130 where Ctrl-C or SIGTERM ended it, with a checkpoint."""
    try:
        config, resume = parse(arguments)
        with process_group(config.device):
            return train(config, resume)
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(config: TrainConfig, resume: bool) -> int:
    """The run of these options; the exit status is 1 where it was begun and failed."""
    trainer = Trainer(config, resume=resume)
    is_first = trainer.processes.is_first
    for note in notes(trainer) if is_first else ():
        print(f"note: {note}", file=sys.stderr)
    try:
        result = trainer.fit()
    except (NonFiniteError, NotImplementedError, OSError, ValueError) as error:  # weights, a backend, an image, a disk
        print(f"error: {error}", file=sys.stderr)
        return 1

    stopped = result.ended_by == "signal"
    if is_first:
        print(f"{config.model}: step {result.step}, ended by {result.ended_by}; newest checkpoint {result.checkpoint}")
        output = shlex.quote(config.output)
        if stopped:
            print(f"continue with: python -m models.train --resume --output {output}")
        else:
            print(f"samples in {trainer.run / 'samples'}, loss curve {trainer.run / 'loss.png'}")
            print(f"sample more: python -m models.sample --checkpoint {output} --output samples")
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
