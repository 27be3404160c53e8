"""Encode images into latents, once: `python -m models.encode --data FOLDER --autoencoder NAME --output LATENTS`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.data.encoding import encode_folder
from models.options import build_config, config_parser, option, require
from models.training.loading import pick_device


@dataclass(frozen=True)
class EncodeConfig:
    """All options of `python -m models.encode`.

    Raises:
        ValueError: an option left out that has no default, or a number out of its range, naming the option.
    """

    data: str = option("", "folder with one subfolder of images per class")
    autoencoder: str = option("", "folder or hub name of a diffusers AutoencoderKL: stabilityai/sd-vae-ft-ema")
    output: str = option(
        "", "new or empty folder for the latents, which `models.train --data` then takes, or one to go on with"
    )
    image_size: int = option(256, "side in pixels that images are cut and scaled to")
    flip: bool = option(True, "encode mirror images too, for training to choose from; twice the time and space")
    batch_size: int = option(32, "images at a time: a matter of speed and memory", alias="batch")
    workers: int = option(0, "processes that read images")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU if there is one")

    def __post_init__(self) -> None:
        for name in ("data", "autoencoder", "output"):
            require(self, name, getattr(self, name) != "", "given")
        for name in ("image_size", "batch_size"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "workers", self.workers >= 0, "at least 0")


def encode(config: EncodeConfig) -> int:
    """Encode what `config` names, with a progress bar; returns the number of images.

    Raises:
        ImportError, ValueError: as `encode_folder` does.
    """
    return encode_folder(
        config.data,
        config.autoencoder,
        config.output,
        image_size=config.image_size,
        flip=config.flip,
        batch_size=config.batch_size,
        workers=config.workers,
        device=pick_device(config.device),
        progress=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 2 where it asks for something impossible, 130 after an interrupt."""
    try:
        description = "Encode images into the latents that latent models train on."
        parser = config_parser(EncodeConfig, prog="python -m models.encode", description=description)
        config = build_config(EncodeConfig, parser.parse_args(arguments))
        count = encode(config)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("\n".join(["interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        return 130
    print(f"{count} images: {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
