"""Images between a model's [-1, 1] floats, uint8 and PNG grids."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MIN_TILE = 64  # pixels: small images are enlarged to about this side, so that a person can read them
FONT_SIZE = 16


def to_uint8(images: Tensor) -> Tensor:
    """Model range to file range: float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clamped and rounded.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: not 4-d, empty, or not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a float tensor in [-1, 1], got {describe(images)}")
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
    check_uint8(images)
    if channels == 1 and images.shape[-1] == 3:
        if not (images == images[..., :1]).all():
            raise ValueError("images are in colour, but the dataset is grey (1 channel): pass samples of that dataset")
        images = images[..., :1]
    if channels is not None and images.shape[-1] != channels:
        raise ValueError(f"images must have {channels} channels, got {images.shape[-1]}: pass samples of that dataset")
    return images.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1).contiguous()


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
        column_labels: one text per column, above it and cut to its width; none leaves no margin.

    Raises:
        TypeError: `images` is not a uint8 tensor.
        ValueError: the images do not fill the rows, or the labels do not match the rows and columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_uint8(images)
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
        draw.text((x + width / 2, gap), _cut(text, width, font.getlength), fill="black", font=font, anchor="mt")
    for y, text in zip(ys, row_labels, strict=False):
        draw.text((gap, y + height / 2), text, fill="black", font=font, anchor="lm")
    canvas.save(path, format="PNG")


def _cut(text: str, width: int, length: Callable[[str], float]) -> str:
    """The text, or as much of its beginning as is no longer than `width` with an ellipsis."""
    text = " ".join(text.split())  # the name of a folder may hold a line break, which can't be drawn
    cuts = (f"{text[:end].rstrip()}..." for end in range(len(text) - 1, 0, -1))
    return text if length(text) <= width else next((cut for cut in cuts if length(cut) <= width), text[:1])


def check_uint8(images: Tensor) -> None:
    """Raises TypeError or ValueError unless images are uint8 (N, H, W, 1 or 3) with at least one image."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor, got {describe(images)}; convert floats with to_uint8")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"images must be (N, H, W, 1 or 3) with at least one image, got shape {tuple(images.shape)}")


def describe(value: object) -> str:
    """What came, for the message of a TypeError."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
