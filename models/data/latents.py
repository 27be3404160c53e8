"""Latents of a diffusers AutoencoderKL as a dataset: encoded anew at each step, or read from a folder."""

import dataclasses
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.data.folder import draw_flips
from models.data.splits import DataSplits

FORMAT = 1
INDEX, MOMENTS, LABELS = "latents.json", "moments.npy", "labels.npy"
PIXELS_AT_ONCE = 2**20  # encoded together: 16 images of 256x256


class Autoencoder:
    """A frozen diffusers `AutoencoderKL` in float32, on the device of whatever it is given.

    Not an `nn.Module`, so that no model takes it into its checkpoints.

    Args:
        name: local folder that it was saved to, or its name on the Hugging Face hub.

    Attributes:
        name: as given, a folder's path made absolute.
        channels: of a latent.
        downsampling: side of an image over side of its latent.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: neither such a folder nor such a name, or what is there is no whole AutoencoderKL of RGB images.

    Source: R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022).
    """

    def __init__(self, name: str) -> None:
        self.name = autoencoder_name(name)
        self._vae = _load_vae(self.name)
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.downsampling: int = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor: float = config.scaling_factor
        self.shift_factor: float = config.shift_factor or 0.0

    def latent_size(self, image_size: int) -> int:
        """Side of the latents of images of a side of `image_size` pixels.

        Raises:
            ValueError: the autoencoder's downsampling does not divide `image_size`.
        """
        if image_size % self.downsampling:
            raise ValueError(
                f"image_size must be a multiple of {self.downsampling}, the downsampling of the autoencoder "
                f"{self.name!r}, got {image_size}"
            )
        return image_size // self.downsampling

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the images' latents, before scaling.

        Args:
            images: float32 (N, 3, H, W) in [-1, 1], H and W multiples of `downsampling`.

        Returns:
            float32 (N, 2 * channels, h, w), the means first.
        """
        vae, parts = self._vae.to(images.device), []
        with torch.autocast(images.device.type, enabled=False):
            for part in images.split(max(1, PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))):
                latents = vae.encode(part).latent_dist
                parts.append(torch.cat([latents.mean, latents.std], dim=1))
        return torch.cat(parts)

    def draw(self, moments: Tensor) -> Tensor:
        """`draw_latents` with the autoencoder's own factors."""
        return draw_latents(moments, self.scaling_factor, self.shift_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents, as `draw` gives them, to images.

        Goes one by one, which bounds the memory and keeps an image's bits from depending on its batch mates.

        Args:
            latents: float32 (N, channels, h, w).

        Returns:
            float32 (N, 3, H, W), about [-1, 1], not clipped.
        """
        vae, scaled = self._vae.to(latents.device), latents / self.scaling_factor + self.shift_factor
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([vae.decode(latent).sample for latent in scaled.split(1)])


@lru_cache(maxsize=1)
def load_autoencoder(name: str) -> Autoencoder:
    """`Autoencoder`, the last one shared: training that encodes also decodes its sample grids."""
    return Autoencoder(name)


def draw_latents(moments: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """Latents for a model, drawn from their distributions: (N, 2C, h, w) as of `Autoencoder.moments` -> (N, C, h, w).

    Draws from the global generator of the moments' device, as diffusers' `latent_dist.sample()` does.
    """
    mean, std = moments.chunk(2, dim=1)
    # By shape: randn_like would fill the strides of a view, and so give other latents than diffusers.
    noise = torch.randn(mean.shape, device=mean.device)
    return (mean + std * noise - shift_factor) * scaling_factor


def autoencoder_name(name: str) -> str:
    """A local folder's absolute path; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def with_autoencoder(data: DataSplits, name: str) -> DataSplits:
    """`data` of images, whose draw encodes them and draws their latents at every step.

    Slower than training on what `encode_folder` wrote, but takes no disk space.

    Args:
        data: RGB images, as `load_folder` gives them.
        name: local folder or hub name of the autoencoder.

    Raises:
        ImportError, ValueError: as `Autoencoder` does; `data` is no dataset of RGB images, or of another size than the
            autoencoder takes.
    """
    if data.channels != 3 or data.draw is None or data.autoencoder is not None:
        raise ValueError(f"data must be a folder of RGB images for an autoencoder, got {data.name!r}: leave it out")
    autoencoder, pixels = load_autoencoder(autoencoder_name(name)), data.draw

    def draw(images: Tensor) -> Tensor:
        return autoencoder.draw(autoencoder.moments(pixels(images)))

    size = autoencoder.latent_size(data.image_size)
    return dataclasses.replace(
        data, image_size=size, channels=autoencoder.channels, draw=draw, autoencoder=autoencoder.name
    )


class LatentFolder(Dataset[tuple[Tensor, Tensor]]):
    """Items `(moments, label)` of what `encode_folder` wrote: float32 (views, 2C, h, w) and int64 ()."""

    def __init__(self, path: Path, labels: Tensor) -> None:
        self.path, self.labels = path, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(self._moments[index])), self.labels[index]

    def __getstate__(self) -> dict[str, Any]:
        # Each loading process maps the file itself: a pickled map would be the whole array.
        return {"path": self.path, "labels": self.labels}

    @cached_property
    def _moments(self) -> np.ndarray:
        return _map_array(self.path / MOMENTS)


def load_latents(path: str | Path, *, flip: bool = True) -> DataSplits:
    """What `encode_folder` wrote, to train on; nothing is held out. Needs no diffusers.

    Args:
        path: the folder.
        flip: take each image or its mirror image, at random, if the folder has both.

    Raises:
        ValueError: not such a folder, half-written or damaged.
    """
    path = Path(path)
    index = _read_index(path)
    moments, labels = _map_array(path / MOMENTS), _map_array(path / LABELS)
    shape, classes = tuple(index["moments_shape"]), tuple(index["class_names"])
    if moments.shape != shape or moments.dtype != np.float32:
        raise _damaged(path / MOMENTS, f"expected float32 {shape}, got {moments.dtype} {moments.shape}")
    if labels.shape != shape[:1] or labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(classes):
        raise _damaged(
            path / LABELS, f"expected int64 {shape[:1]} in [0, {len(classes)}), got {labels.dtype} {labels.shape}"
        )
    factors, flip = (index["scaling_factor"], index["shift_factor"]), flip and shape[1] == 2

    def draw(views: Tensor) -> Tensor:
        view = draw_flips(len(views), views.device).long() if flip else 0
        return draw_latents(views[torch.arange(len(views), device=views.device), view], *factors)

    return DataSplits(
        name=str(path),
        train=LatentFolder(path, torch.from_numpy(np.array(labels))),
        holdout=None,
        num_classes=len(classes),
        image_size=shape[-1],
        channels=shape[2] // 2,
        class_names=classes,
        draw=draw,
        autoencoder=index["autoencoder"],
    )


def holds_latents(path: str | Path) -> bool:
    """Whether the folder is what `encode_folder` wrote, or a part of it."""
    return any((Path(path) / name).exists() for name in (INDEX, MOMENTS))


def _load_vae(name: str) -> torch.nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f"{error}; autoencoders for latents need: pip install diffusers") from error

    try:
        vae, info = AutoencoderKL.from_pretrained(
            name,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # it needs accelerate, and diffusers would say so each time
            output_loading_info=True,
        )
    except Exception as error:  # of the hub, the network, the files: whatever it is, this name is of no use
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"autoencoder {name!r} is neither a folder with a diffusers AutoencoderKL (config.json and its weights) "
            f"nor a name on the Hugging Face hub that can be fetched: {reason}"
        ) from error
    if absent := info["missing_keys"]:  # diffusers only warns, and leaves random weights in their places
        raise ValueError(
            f"autoencoder {name!r} lacks {len(absent)} weights, such as {absent[0]!r}: save or fetch it again"
        )
    channels = vae.config.in_channels, vae.config.out_channels
    if channels != (3, 3):
        raise ValueError(
            f"autoencoder {name!r} must be of RGB images, it takes {channels[0]} channels and gives {channels[1]}"
        )
    return vae.eval().requires_grad_(False)


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX).is_file():
        raise ValueError(
            f"{path} holds no {INDEX}, which is written last: it is no folder of latents, or a half-written one, "
            "which the same `python -m models.encode` goes on with"
        )
    try:
        index = json.loads((path / INDEX).read_text())
        version = index["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path / INDEX, repr(error)) from error
    if version != FORMAT:
        raise ValueError(f"{path / INDEX} is of format {version!r}, expected {FORMAT}: encode the images again")
    keys = {"autoencoder", "scaling_factor", "shift_factor", "image_size", "class_names", "moments_shape"}
    if missing := keys - index.keys():
        raise _damaged(path / INDEX, f"{sorted(missing)} missing")
    return index


def _map_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged or incomplete ({reason}): encode the images again")
