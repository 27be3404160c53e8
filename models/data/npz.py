"""The `.npz` of images that the ADM evaluator reads, written and read, whole or as a stream."""

import json
import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data.images import check_uint8, describe
from models.files import write_atomically

IMAGES, LABELS, ORIGIN = "arr_0", "labels", "origin"


def save_npz(
    path: str | Path, images: Tensor, labels: Tensor | None = None, *, origin: dict[str, Any] | None = None
) -> None:
    """Write images as the ADM evaluator reads them: key `arr_0`, uint8 (N, H, W, 3), grey repeated to RGB.

    The file appears whole or not at all.

    Args:
        path: file to write; the name is kept as it is.
        images: uint8 (N, H, W, C), C being 1 or 3, as `to_uint8` gives them.
        labels: (N,) integers, stored under `labels`, which the ADM evaluator ignores.
        origin: what the images were made from, stored as JSON under `origin`, which it ignores too.

    Source: openai/guided-diffusion, evaluations/evaluator.py.
    """
    check_uint8(images)
    arrays = {IMAGES: images.expand(-1, -1, -1, 3).contiguous().cpu().numpy()}
    if labels is not None:
        _check_label_shape(labels, len(images))
        arrays[LABELS] = labels.to(torch.int64).cpu().numpy()
    if origin is not None:
        arrays[ORIGIN] = np.array(json.dumps(origin))
    write_atomically(Path(path), lambda file: np.savez(file, **arrays))


def load_npz(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Read what `save_npz` wrote: uint8 (N, H, W, 3) images, and int64 (N,) labels or None. Executes nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an npz file, truncated, without `arr_0`, or of another dtype or shape.
    """
    image_shape(path)
    arrays = read_arrays(path, (IMAGES, LABELS))
    images, labels = arrays[IMAGES], arrays.get(LABELS)
    if labels is None:
        return torch.from_numpy(images), None
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{path}: labels must be integers ({len(images)},), got {labels.dtype} {labels.shape}")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def load_labels(path: str | Path) -> Tensor | None:
    """The labels of `load_npz`, int64 (N,) or None, without its images."""
    labels = read_arrays(path, (LABELS,)).get(LABELS)
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))


def load_origin(path: str | Path) -> dict[str, Any] | None:
    """The `origin` that `save_npz` was given, if any."""
    origin = read_arrays(path, (ORIGIN,)).get(ORIGIN)
    return None if origin is None else json.loads(str(origin))


def image_shape(path: str | Path) -> tuple[int, int, int, int]:
    """(N, H, W, 3) of the images in an `.npz`, read from its header alone.

    Raises:
        FileNotFoundError, ValueError: as `load_npz` does.
    """
    if IMAGES not in (names := array_names(path)):
        raise ValueError(f"{path}: expected the key {IMAGES!r}, got {names}; write the file with save_npz")
    with _open_npz(path) as file:
        _, shape, dtype = _open_images(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or math.prod(shape) == 0:
        raise ValueError(
            f"{path}: {IMAGES} must be uint8 (N, H, W, 3) with at least one image, "
            f"got {dtype} {shape}; convert with to_uint8 and write the file with save_npz"
        )
    return shape


def iterate_images(paths: Sequence[str | Path], batch_size: int) -> Iterator[Tensor]:
    """The images of `.npz` files one after another, uint8 (batch_size, H, W, 3), the last batch smaller.

    Batches run across the ends of files, so that they do not depend on how the images were divided. One batch is in
    memory at a time.

    Raises:
        FileNotFoundError, ValueError: as `load_npz` does; images of several sizes.
    """
    shapes = [image_shape(path) for path in paths]
    for path, shape in zip(paths, shapes, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise ValueError(f"{path} holds images of {shape[1:]}, but {paths[0]} of {shapes[0][1:]}: score them apart")
    parts, missing = [], batch_size
    for path, (remaining, *size) in zip(paths, shapes, strict=True):
        with _open_npz(path) as file:
            stream = _open_images(file)[0]
            while remaining:
                count = min(missing, remaining)
                pixels = bytearray(stream.read(count * math.prod(size)))
                if len(pixels) != count * math.prod(size) or (count == remaining and stream.read(1)):
                    raise EOFError(f"{IMAGES} holds more or fewer bytes than its header says")
                parts.append(torch.frombuffer(pixels, dtype=torch.uint8).view(count, *size))
                remaining, missing = remaining - count, missing - count
                if not missing:
                    yield torch.cat(parts)
                    parts, missing = [], batch_size
    if parts:
        yield torch.cat(parts)


def join_npz(paths: Sequence[str | Path], output: str | Path) -> None:
    """Write the images and labels of several `.npz` files as one, which the ADM evaluator takes, as a stream.

    Raises:
        FileNotFoundError, ValueError: as `iterate_images` does.
    """
    shapes, labels = [image_shape(path) for path in paths], [load_labels(path) for path in paths]
    header = {"descr": "|u1", "fortran_order": False, "shape": (sum(shape[0] for shape in shapes), *shapes[0][1:])}

    def write(file: Any) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for batch in iterate_images(paths, 64):
                    member.write(batch.numpy().data)
            if all(part is not None for part in labels):
                with archive.open(f"{LABELS}.npy", "w") as member:
                    np.lib.format.write_array(member, torch.cat(labels).numpy(), allow_pickle=False)

    write_atomically(Path(output), write)


def array_names(path: str | Path) -> list[str]:
    """The names of the arrays in an `.npz`, sorted.

    Raises:
        FileNotFoundError, ValueError: as `read_arrays` does.
    """
    with _open_npz(path) as file:
        return sorted(file.files)


def read_arrays(path: str | Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the arrays `names` that an `.npz` holds; others are not read. Executes nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an npz file, truncated, or an array of Python objects.
    """
    with _open_npz(path) as file:
        return {name: file[name] for name in file.files if name in names}


@contextmanager
def _open_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with zipfile.ZipFile(path):  # np.load would take a plain .npy too, and call a damaged file a pickle
            pass
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole npz file of plain arrays ({error}); write it again") from error


def _open_images(file: np.lib.npyio.NpzFile) -> tuple[Any, tuple[int, ...], np.dtype]:
    """The images' stream, placed behind its header, with their shape and dtype."""
    stream = file.zip.open(f"{IMAGES}.npy")
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in read_header:
        raise ValueError(f"{IMAGES} is stored in version {version} of the npy format")
    shape, fortran_order, dtype = read_header[version](stream)
    if fortran_order or dtype.hasobject:
        raise ValueError(f"{IMAGES} is stored with its last axis outermost, or holds Python objects")
    return stream, shape, dtype


def _check_label_shape(labels: Tensor, count: int) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TypeError(f"labels must be a tensor of integers, got {describe(labels)}")
    if labels.shape != (count,):
        raise ValueError(f"labels must be ({count},), one for each image, got shape {tuple(labels.shape)}")
