"""The files of one sampling run: `samples.npz`, or its parts `samples-000000.npz`, `samples-005000.npz` and so on."""

from pathlib import Path

import torch
from torch import Tensor

from models.data.npz import image_shape, load_npz, load_origin

WHOLE = "samples.npz"


def part_name(first: int) -> str:
    """File name of the part that begins with the run's image number `first`."""
    return f"samples-{first:06d}.npz"


def sample_files(path: str | Path) -> list[Path]:
    """The file `path`; or of a folder that `models.sample` wrote, its `samples.npz` or all its parts, in order.

    Raises:
        FileNotFoundError: a folder without samples.
        ValueError: parts beside a `samples.npz`, parts of different runs, or parts that are not a run's images from the
            first on without a gap.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    whole, parts = folder / WHOLE, sorted(folder.glob("samples-*.npz"))
    if whole.exists() and parts:
        raise ValueError(
            f"{folder} holds {WHOLE} and parts such as {parts[0].name}: name one file, or remove the other"
        )
    if not whole.exists() and not parts:
        raise FileNotFoundError(f"{folder} holds no {WHOLE}, nor parts such as {part_name(0)}")
    return [whole] if whole.exists() else _checked(parts)


def _checked(parts: list[Path]) -> list[Path]:
    origins = {part: load_origin(part) for part in parts}
    unknown = [part for part, origin in origins.items() if origin is None]
    if unknown:
        raise ValueError(f"{unknown[0]} does not tell which part of a run it is: write it with models.sample")
    parts = sorted(parts, key=lambda part: origins[part]["first"])
    expected = 0
    for part in parts:
        check_request(part, origins[part]["request"], origins[parts[0]]["request"], f"{parts[0].name} was")
        first = origins[part]["first"]
        if first != expected:
            problem = "is missing" if first > expected else "is there twice"
            raise ValueError(
                f"{part.parent}: image {min(first, expected)} {problem}, {part.name} begins with image {first}: "
                "sample what is missing, remove what is there twice, or name one file"
            )
        expected += image_shape(part)[0]
    return parts


def check_request(part: Path, found: dict, wanted: dict, whose: str) -> None:
    """Raises ValueError, naming the first difference, unless a part was sampled as is wanted."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{part} was sampled with {name} {found.get(name)!r}, but {whose} with {wanted.get(name)!r}: "
                "keep the parts of each run in a folder of their own"
            )


def load_samples(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """All of `sample_files` in memory: uint8 (N, H, W, 3) images, and int64 (N,) labels, None where a file has none.

    Raises:
        FileNotFoundError, ValueError: as `sample_files` and `load_npz` do.
    """
    images, labels = zip(*map(load_npz, sample_files(path)), strict=True)
    return torch.cat(images), None if any(part is None for part in labels) else torch.cat(labels)
