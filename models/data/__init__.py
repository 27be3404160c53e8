"""Datasets by name, and the image files that sampling writes and evaluation reads."""

import difflib

from models.data.digits import load_digits
from models.data.images import from_uint8, load_npz, save_grid, save_npz, to_uint8
from models.data.splits import DataSplits, check_labels, collect, rank_in_class

__all__ = [
    "DataSplits",
    "check_labels",
    "collect",
    "from_uint8",
    "load_dataset",
    "load_npz",
    "rank_in_class",
    "save_grid",
    "save_npz",
    "to_uint8",
]

DATASETS = {"digits": load_digits}


def load_dataset(name: str) -> DataSplits:
    """The dataset called `name`, with its fixed split: "digits".

    Raises:
        ValueError: no dataset has that name; the message lists the near ones.
        ImportError: the library that the dataset comes with is not installed.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name).lower(), DATASETS, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(f"unknown dataset {name!r}; did you mean {' or '.join(map(repr, near))}?")
    return DATASETS[name]()
