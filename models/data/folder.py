"""Folders of images, one subfolder per class, as a dataset: read, straightened, cut to a square."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.data.splits import DataSplits

if TYPE_CHECKING:
    from PIL import Image

# Some of these Pillow reads only with a plugin: better an error that names the file than a file passed over in silence.
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Items `(image, label)`: uint8 (3, image_size, image_size), a quarter of the floats' memory, and int64 ().

    Class subfolders in the order of their names (by code point: "10" before "2") are the labels 0, 1, ...; images at
    any depth below a class folder belong to it. Hidden files and folders, `__MACOSX` and files without an image's
    suffix are passed over. Links to folders are followed, each folder being read once per class. No file is opened
    before its item is asked for, which raises ValueError where the file holds no whole image (see `read_image`).

    Args:
        path: the folder.
        image_size: side of the images in pixels, at least 1.

    Raises:
        ValueError: no such folder, images beside the class folders, no class folder, or one without images.
    """

    def __init__(self, path: str | Path, image_size: int) -> None:
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size must be a whole number of pixels, at least 1, got {image_size!r}")
        self.path, self.image_size = Path(path), image_size
        self.class_names = _class_names(self.path)
        seen = {_identity(folder) for folder in (self.path.resolve(), *self.path.resolve().parents)}
        files: list[bytes] = []
        counts = []
        for name in self.class_names:
            before = len(files)
            files.extend(os.fsencode(file) for file in _images_below(str(self.path / name), set(seen)))
            counts.append(len(files) - before)
            if not counts[-1]:
                raise ValueError(
                    f"the class folder {self.path / name} holds no image, none of its files ends in "
                    f"{', '.join(sorted(SUFFIXES))}: put images in, or remove it"
                )
        # One array, since a million strings would be copied into each loading process as their references are counted.
        self._files = np.array(files)
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (N,) int64

    def __len__(self) -> int:
        return len(self._files)

    def file_names(self) -> list[str]:
        """The items' files, relative to the folder."""
        return [str(Path(os.fsdecode(file)).relative_to(self.path)) for file in self._files]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return read_image(os.fsdecode(self._files[index]), self.image_size), self.labels[index]


def load_folder(path: str | Path, *, image_size: int = 256, flip: bool = True) -> DataSplits:
    """A folder of images, one subfolder per class, to train on; nothing is held out.

    Args:
        path: the folder; see `ImageFolder` for what it holds and `read_image` for how images become squares.
        image_size: side of the images in pixels, at least 1.
        flip: show the model each image or its mirror image, at random.

    Raises:
        ValueError: as `ImageFolder` says.
        ImportError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("image folders are read by Pillow, which is missing: pip install pillow") from error

    images = ImageFolder(path, image_size)
    return DataSplits(
        name=str(path),
        train=images,
        holdout=None,
        num_classes=len(images.class_names),
        image_size=image_size,
        channels=3,
        class_names=images.class_names,
        draw=partial(draw_pixels, flip=flip),
    )


def draw_pixels(images: Tensor, *, flip: bool) -> Tensor:
    """Levels to a model's images: uint8 (N, C, H, W) -> float32 of the same shape in [-1, 1], flipped at random."""
    pixels = scale_pixels(images)
    if not flip:
        return pixels
    return torch.where(draw_flips(len(pixels), pixels.device).view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def scale_pixels(images: Tensor) -> Tensor:
    """Levels 0 to 255 -> float32 in [-1, 1], of the same shape."""
    return images.to(torch.float32).div(127.5).sub(1)


def draw_flips(count: int, device: torch.device) -> Tensor:
    """(count,) bool, each true with probability 1/2, from the device's global generator."""
    return torch.rand(count, device=device) < 0.5


def read_image(path: str | Path, image_size: int) -> Tensor:
    """The centre of an image file: uint8 (3, image_size, image_size).

    The image is turned as its EXIF orientation says; of an animation it is the first frame. Transparent images are laid
    on white, as viewers show them, for the colours below the transparency are arbitrary (but for a transparent colour
    of a 16-bit RGB PNG, which Pillow drops). 16-bit levels are scaled to 8 bits. Other colour modes (grey, palette,
    CMYK) become RGB as Pillow converts them, without colour management.

    Raises:
        ValueError: the file is missing, damaged, no image, too large for Pillow's guard against decompression bombs, or
            has levels of unknown range (floats, 32-bit integers); the message names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            square = _centre_crop(_to_rgb(image), image_size)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image {path} is too large ({error}): scale it down, or remove it") from error
    except Exception as error:  # Pillow's decoders raise nearly anything where a file is damaged
        raise ValueError(f"the image {path} can't be read ({error}): repair, convert or remove it") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats (mode F) of unknown range")
    if image.mode.startswith("I"):  # PNG, TIFF and PGM with 16-bit grey levels, on whose high end convert() clips
        levels = np.asarray(image).astype(np.int64)
        fixed_range = image.mode != "I" or image.format in ("PNG", "PPM")  # their files say 16 bits
        if not fixed_range or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels are 32-bit integers (mode I) of unknown range")
        grey = ((levels + 128) // 257).astype(np.uint8)  # rounds 65535 / 257 = 255
        if isinstance(image.info.get("transparency"), int):
            grey[levels == image.info["transparency"]] = 255  # laid on white, as below
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _centre_crop(image: "Image.Image", size: int) -> "Image.Image":
    """The largest centred square, scaled to `size`. Source: center_crop_arr of openai/guided-diffusion."""
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:  # averages in halves first: cheaper than one large filter
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: pass a folder that has one subfolder of images per class")
    entries = list(_visible(str(path)))
    stray = next((entry.name for entry in entries if not entry.is_dir() and _is_image(entry.name)), None)
    if stray:
        raise ValueError(
            f"{path} holds the image {stray} beside its class folders, so that it is of no class: "
            "move images into one subfolder per class"
        )
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ValueError(f"{path} holds no class folder: put the images of each class into a subfolder")
    return tuple(names)


def _images_below(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of the images below `folder`, in the order of their names; folders in `seen` are not entered again."""
    identity = _identity(folder)
    if identity in seen:
        return
    seen.add(identity)
    for entry in sorted(_visible(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _images_below(entry.path, seen)
        elif _is_image(entry.name):
            yield entry.path


def _visible(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _identity(folder: str | Path) -> tuple[int, int]:
    """What is the same by whatever links the folder is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino
