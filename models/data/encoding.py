"""A folder of images encoded once, into a folder of latents; what was stopped goes on where it was."""

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from models.data.folder import load_folder, scale_pixels
from models.data.latents import FORMAT, INDEX, LABELS, MOMENTS, Autoencoder, autoencoder_name, load_autoencoder
from models.files import FileLock, write_atomically
from models.progress import progress_bar

ENCODED = "encoded.jsonl"  # while it is not finished: the settings, then the files of each batch


def encode_folder(
    folder: str | Path,
    autoencoder: str,
    output: str | Path,
    *,
    image_size: int = 256,
    flip: bool = True,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> int:
    """Encode a folder of images once, for `load_latents`; returns the number of images.

    Writes moments.npy, float32 (N, views, 2C, h, w) as of `Autoencoder.moments`, a view per image and one more for its
    mirror image where `flip`; labels.npy, int64 (N,); and last of all latents.json, without which the folder is no
    dataset. Where anything goes wrong whole batches stay, and the same call goes on after them, also where an image
    that comes later was repaired or removed.

    Args:
        folder: as `load_folder` takes it.
        autoencoder: as `Autoencoder` takes it.
        output: new or empty folder, or one that such a call has begun.
        batch_size: images encoded at a time.
        workers: processes that read images.
        progress: tell how much space is needed, and show a progress bar (tqdm).

    Raises:
        ImportError, ValueError: `output` is in use, or was begun with other settings or images; an image can't be read,
            the latents are not finite, or as `load_folder` and `with_autoencoder` say.
    """
    data, output = load_folder(folder, image_size=image_size, flip=False), Path(output)
    if output.exists() and not (output.is_dir() and ((output / ENCODED).exists() or not any(output.iterdir()))):
        raise ValueError(f"output must be a new or an empty folder, {output} is neither: choose another, or empty it")
    encoder = load_autoencoder(autoencoder_name(autoencoder))
    size = encoder.latent_size(image_size)
    shape = (len(data.train), 1 + flip, 2 * encoder.channels, size, size)
    settings = {
        "format": FORMAT,
        "autoencoder": encoder.name,
        "scaling_factor": encoder.scaling_factor,
        "shift_factor": encoder.shift_factor,
        "image_size": image_size,
        "flip": flip,
    }
    output.mkdir(parents=True, exist_ok=True)
    if progress:
        needed, free = 4 * math.prod(shape), shutil.disk_usage(output).free
        print(f"{output}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", file=sys.stderr)
    names, row = data.train.file_names(), math.prod(shape[1:]) * 4  # bytes
    with closing(FileLock(output / MOMENTS, f"another process encodes into {output}: wait for it to end")):
        done = _find_encoded(output, settings, names, row)
        if done < len(names):
            done -= done % batch_size  # in the same batches, the latents are the same to the bit
        batches = _load_rest(data.train, done, batch_size, workers, progress)
        try:
            lines = [json.dumps(settings), json.dumps(names[:done])]
            write_atomically(output / ENCODED, lambda file: file.write(("\n".join(lines) + "\n").encode()))
            # From front to back, since a memory map that is written to kills the process where the disk is full.
            with open(output / MOMENTS, "r+b") as file, open(output / ENCODED, "a") as encoded:
                file.write(_header(shape))
                file.truncate(file.tell() + done * row)
                file.seek(0, os.SEEK_END)
                for images, _ in batches:
                    moments = _encode_views(encoder, scale_pixels(images.to(device)), flip)
                    if not moments.isfinite().all():
                        raise ValueError(f"the autoencoder {encoder.name!r} gives NaN or infinity: use another one")
                    file.write(moments.cpu().numpy().astype("<f4").tobytes())
                    file.flush()
                    encoded.write(json.dumps(names[done : done + len(images)]) + "\n")
                    encoded.flush()
                    done += len(images)
                os.fsync(file.fileno())
            write_atomically(output / LABELS, lambda file: np.save(file, data.train.labels.numpy()))
            index = {**settings, "class_names": data.class_names, "moments_shape": shape}
            del index["flip"]  # which the shape tells
            write_atomically(output / INDEX, lambda file: file.write((json.dumps(index) + "\n").encode()))
            (output / ENCODED).unlink()
        except BaseException as error:  # an interrupt too
            if done:
                error.add_note(f"{done} images are encoded: the same command goes on after them")
            else:
                for name in (INDEX, LABELS, MOMENTS, ENCODED):
                    (output / name).unlink(missing_ok=True)
            raise
    return len(names)


def _load_rest(images: Dataset, done: int, batch_size: int, workers: int, progress: bool) -> Iterable[list[Tensor]]:
    rest = Subset(images, range(done, len(images)))
    batches = DataLoader(rest, batch_size, num_workers=workers, generator=torch.Generator())
    if not progress:
        return batches
    total = math.ceil(len(images) / batch_size)
    return progress_bar(batches, initial=total - len(batches), total=total, desc="encode", unit="batch")


def _find_encoded(output: Path, settings: dict[str, Any], names: list[str], row: int) -> int:
    """How many images, from the first on, an earlier call has encoded as is asked for, in rows of so many bytes.

    Raises:
        ValueError: it had other settings, or other images in their places.
    """
    if not (output / ENCODED).exists():
        return 0
    lines = (output / ENCODED).read_text().splitlines(keepends=True)
    was, *batches = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut short
    for name in sorted(was.keys() | settings.keys()):
        if was.get(name) != settings.get(name):
            raise ValueError(
                f"{output} was begun with {name} {was.get(name)!r}, got {settings.get(name)!r}: keep that to go on, or "
                "empty the folder"
            )
    encoded = [name for batch in batches for name in batch]
    whole = ((output / MOMENTS).stat().st_size - len(_header((0,)))) // row
    encoded = encoded[: max(whole, 0)]
    for index, name in enumerate(encoded):
        if names[index : index + 1] != [name]:
            raise ValueError(
                f"{output} was begun with other images: {name} was number {index}. Bring back what was there, or empty "
                "the folder"
            )
    return len(encoded)


def _header(shape: tuple[int, ...]) -> bytes:
    """Of an .npy file of float32; NumPy leaves room in it, so that it is as long for any number of rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _encode_views(encoder: Autoencoder, images: Tensor, flip: bool) -> Tensor:
    views = [images, images.flip(-1)] if flip else [images]
    return torch.stack([encoder.moments(view) for view in views], dim=1)  # (N, views, 2C, h, w)
