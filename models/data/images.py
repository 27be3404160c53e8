"""Images between a model's [-1, 1] floats, uint8, PNG grids and the `.npz` that the ADM evaluator reads."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.files import write_atomically

MIN_TILE = 64  # pixels: small images are enlarged to about this side, so that a person can read them
FONT_SIZE = 16


def to_uint8(images: Tensor) -> Tensor:
    """Model range to file range: float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clamped and rounded.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: not 4-d, empty, or not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a float tensor in [-1, 1], got {_describe(images)}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must be (N, C, H, W) with at least one image, got shape {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity: the model that made them diverged; check its training loss")
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor, channels: int | None = None) -> Tensor:
    """File range to model range: uint8 (N, H, W, C) -> float32 (N, channels, H, W) in [-1, 1].

    Args:
        images: uint8 (N, H, W, C), C being 1 or 3.
        channels: channels wanted; None keeps C. 1 undoes the grey-to-RGB repetition of `save_npz`.

    Raises:
        TypeError: `images` is not a uint8 tensor.
        ValueError: not 4-d, empty, or colours where grey images are wanted, or the reverse.
    """
    _check_uint8(images)
    if channels == 1 and images.shape[-1] == 3:
        if not (images == images[..., :1]).all():
            raise ValueError("images are in colour, but the dataset is grey (1 channel): pass samples of that dataset")
        images = images[..., :1]
    if channels is not None and images.shape[-1] != channels:
        raise ValueError(f"images must have {channels} channels, got {images.shape[-1]}: pass samples of that dataset")
    return images.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1).contiguous()


def save_npz(path: str | Path, images: Tensor, labels: Tensor | None = None) -> None:
    """Write images as the ADM evaluator reads them: key `arr_0`, uint8 (N, H, W, 3), grey repeated to RGB.

    The file appears whole or not at all.

    Args:
        path: file to write; the name is kept as it is.
        images: uint8 (N, H, W, C), C being 1 or 3, as `to_uint8` gives them.
        labels: (N,) integers, stored under `labels`, which the ADM evaluator ignores.

    Source: openai/guided-diffusion, evaluations/evaluator.py.
    """
    _check_uint8(images)
    arrays = {"arr_0": images.expand(-1, -1, -1, 3).contiguous().cpu().numpy()}
    if labels is not None:
        _check_label_shape(labels, len(images))
        arrays["labels"] = labels.to(torch.int64).cpu().numpy()
    write_atomically(Path(path), lambda file: np.savez(file, **arrays))


def load_npz(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Read what `save_npz` wrote: uint8 (N, H, W, 3) images, and int64 (N,) labels or None. Executes nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an npz file, truncated, without `arr_0`, or of another dtype or shape.
    """
    arrays = _read_arrays(Path(path))
    if "arr_0" not in arrays:
        raise ValueError(f"{path}: expected the key 'arr_0', got {sorted(arrays)}; write the file with save_npz")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(
            f"{path}: arr_0 must be uint8 (N, H, W, 3) with at least one image, "
            f"got {images.dtype} {images.shape}; convert with to_uint8 and write the file with save_npz"
        )
    if "labels" not in arrays:
        return torch.from_numpy(images), None
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{path}: labels must be integers ({len(images)},), got {labels.dtype} {labels.shape}")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def save_grid(
    path: str | Path,
    images: Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """Write images as one PNG, row by row, small ones enlarged by whole pixels, with gaps and optional labels.

    Args:
        path: the PNG to write.
        images: uint8 (N, H, W, C), C being 1 or 3, as `to_uint8` gives them; N a multiple of `columns`.
        columns: images per row.
        row_labels: one text per row, left of it; none leaves no margin.
        column_labels: one text per column, above it; none leaves no margin.

    Raises:
        TypeError: `images` is not a uint8 tensor.
        ValueError: the images do not fill the rows, or the labels do not match the rows and columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    _check_uint8(images)
    count, height, width, _ = images.shape
    if columns < 1 or count % columns:
        raise ValueError(f"columns must be at least 1 and divide the {count} images, got {columns}")
    rows = count // columns
    for name, texts, expected in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if texts and len(texts) != expected:
            raise ValueError(f"{name} must have {expected} entries, one for each, got {len(texts)}")

    scale = max(1, round(MIN_TILE / max(height, width)))
    height, width = height * scale, width * scale
    gap = max(2, height // 8)
    font = ImageFont.load_default(FONT_SIZE)
    left = round(max(map(font.getlength, row_labels))) + gap if row_labels else 0
    top = FONT_SIZE + gap if column_labels else 0
    canvas = Image.new("RGB", (left + columns * (width + gap) + gap, top + rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    xs = [left + gap + column * (width + gap) for column in range(columns)]
    ys = [top + gap + row * (height + gap) for row in range(rows)]
    for index, pixels in enumerate(images.expand(-1, -1, -1, 3).cpu().numpy()):
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (xs[index % columns], ys[index // columns]))
    for x, text in zip(xs, column_labels, strict=False):
        draw.text((x + width / 2, gap), text, fill="black", font=font, anchor="mt")
    for y, text in zip(ys, row_labels, strict=False):
        draw.text((gap, y + height / 2), text, fill="black", font=font, anchor="lm")
    canvas.save(path, format="PNG")


def _check_uint8(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor, got {_describe(images)}; convert floats with to_uint8")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"images must be (N, H, W, 1 or 3) with at least one image, got shape {tuple(images.shape)}")


def _check_label_shape(labels: Tensor, count: int) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TypeError(f"labels must be a tensor of integers, got {_describe(labels)}")
    if labels.shape != (count,):
        raise ValueError(f"labels must be ({count},), one for each image, got shape {tuple(labels.shape)}")


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path):  # np.load would take a plain .npy too, and call a damaged file a pickle
            pass
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole npz file of plain arrays ({error}); write it again") from error
