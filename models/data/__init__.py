"""Datasets by name or folder, and the image files that sampling writes and evaluation reads."""

import difflib
import os
from pathlib import Path

from models.data.digits import load_digits
from models.data.folder import load_folder
from models.data.images import from_uint8, save_grid, to_uint8
from models.data.latents import autoencoder_name, holds_latents, load_autoencoder, load_latents, with_autoencoder
from models.data.npz import array_names, image_shape, iterate_images, join_npz, load_npz, read_arrays, save_npz
from models.data.samples import load_samples, sample_files
from models.data.splits import DataSplits, check_labels, collect, rank_in_class

__all__ = [
    "DataSplits",
    "array_names",
    "check_labels",
    "collect",
    "from_uint8",
    "image_shape",
    "iterate_images",
    "join_npz",
    "load_autoencoder",
    "load_dataset",
    "load_npz",
    "load_samples",
    "rank_in_class",
    "read_arrays",
    "sample_files",
    "save_grid",
    "save_npz",
    "to_uint8",
]

DATASETS = {"digits": load_digits}


def load_dataset(
    name: str, *, image_size: int | None = None, flip: bool = True, autoencoder: str | None = None
) -> DataSplits:
    """The dataset called `name`: "digits" with its fixed split, or a folder of images or latents.

    Args:
        name: "digits"; the path of a folder with one subfolder of images per class; or of what `models.encode` wrote.
        image_size: of image folders, the side in pixels that images are cut and scaled to, 256 by default; other
            datasets have theirs.
        flip: of folders, show the model each image or its mirror image, at random.
        autoencoder: of image folders, local path or hub name of the autoencoder whose latents are trained on; None for
            pixels. Latents have theirs, which it may only repeat.

    Raises:
        ValueError: no dataset has that name, the message lists the near ones; the folder, the options and the
            autoencoder do not fit together, as `load_folder`, `load_latents` and `with_autoencoder` say.
        ImportError: a library that the dataset needs is not installed.
    """
    if name in DATASETS:
        if autoencoder is not None:
            raise ValueError(
                f"autoencoder must be left out for {name!r}, which is trained on as pixels, got {autoencoder!r}"
            )
        if image_size is not None:
            raise ValueError(f"image_size must be left out for {name!r}, which has its own, got {image_size}")
        return DATASETS[name]()
    # An empty path would be the current folder.
    if not (name and Path(name).is_dir()) and not {"/", os.sep} & set(name):
        near = difflib.get_close_matches(str(name).lower(), DATASETS, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(
            f"unknown dataset {name!r}; did you mean {' or '.join(map(repr, near))}? "
            "Otherwise pass the path of a folder with one subfolder of images per class"
        )
    if holds_latents(name):
        if image_size is not None:
            raise ValueError(f"image_size must be left out for {name}, whose images are encoded, got {image_size}")
        data = load_latents(name, flip=flip)
        if autoencoder is not None and autoencoder_name(autoencoder) != data.autoencoder:
            raise ValueError(
                f"autoencoder is {autoencoder!r}, but {name} was encoded by {data.autoencoder!r}: leave it out, "
                "or encode the images again"
            )
        return data
    data = load_folder(name, image_size=image_size or 256, flip=flip)
    return data if autoencoder is None else with_autoencoder(data, autoencoder)
