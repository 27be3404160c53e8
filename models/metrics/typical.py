"""Pictures of what samples look like, without choosing by hand."""

from pathlib import Path

import torch
from torch import Tensor

from models.data import from_uint8, save_grid, to_uint8
from models.metrics.features import DigitsClassifier

ENLARGE = 8  # eight pixels a side are hard to read as squares; smooth enlargement adds nothing to them


def most_typical(images: Tensor, labels: Tensor, classifier: DigitsClassifier) -> Tensor:
    """Of each class the image whose features lie nearest to the mean of its class: uint8 (N, H, W, C) -> (K, H, W, C).

    A picture of one image per class should show what the others look like, neither the best nor a stray one.
    """
    features = classifier.features(from_uint8(images, channels=1))
    chosen = []
    for label in labels.unique():
        (members,) = torch.where(labels == label)
        distances = (features[members] - features[members].mean(0)).norm(dim=1)
        chosen.append(members[distances.argmin()])
    return images[torch.stack(chosen)]


def save_typical_grid(path: Path, rows: dict[str, Tensor]) -> None:
    """A PNG with a row per entry, labelled with its name, and a column per class, enlarged smoothly.

    Args:
        path: file to write.
        rows: uint8 (K, H, W, C) each, as `most_typical` gives them: image k is of class k.
    """
    images = from_uint8(torch.cat(list(rows.values())))
    columns = len(images) // len(rows)
    enlarged = torch.nn.functional.interpolate(images, scale_factor=ENLARGE, mode="bicubic")
    names = [str(label) for label in range(columns)]
    save_grid(path, to_uint8(enlarged), columns, row_labels=list(rows), column_labels=names)
