"""scikit-learn's handwritten digits: 1,797 real 8x8 images of 10 classes that come with the library, no download."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from models.data.splits import DataSplits, rank_in_class

NUM_CLASSES = 10
HOLDOUT_PER_CLASS = 50
SPLIT_SEED = 0


def load_digits() -> DataSplits:
    """Digits as 1,297 training and 500 held-out images, 50 held out of each class, both in a fixed shuffled order.

    Both splits are `TensorDataset`s of float32 (N, 1, 8, 8) in [-1, 1] and int64 (N,).

    Raises:
        ImportError: scikit-learn is not installed.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository (1998), test part.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from error

    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div(8).sub(1).unsqueeze(1)  # grey levels 0..16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    # RandomState, since NumPy promises that its stream stays the same in every version (NEP 19).
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(labels)))
    images, labels = images[order], labels[order]
    held_out = rank_in_class(labels, NUM_CLASSES) < HOLDOUT_PER_CLASS
    return DataSplits(
        name="digits",
        train=TensorDataset(images[~held_out], labels[~held_out]),
        holdout=TensorDataset(images[held_out], labels[held_out]),
        num_classes=NUM_CLASSES,
        image_size=images.shape[-1],
        channels=images.shape[1],
    )
