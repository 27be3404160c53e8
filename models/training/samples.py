"""The picture of samples that a run leaves now and then."""

from pathlib import Path

from torch import nn

from models.data import DataSplits, save_grid
from models.objectives import Objective
from models.sampling import balanced_labels, sample_images, to_images
from models.training.config import TrainConfig

GRID_COLUMNS = 10  # classes shown at most


def save_samples(path: Path, model: nn.Module, objective: Objective, config: TrainConfig, data: DataSplits) -> None:
    """Write a grid of a model's samples, a column per class; a folder that is not there is made."""
    columns = min(data.num_classes, GRID_COLUMNS)
    labels = balanced_labels(columns * config.sample_rows, range(columns))
    samples = sample_images(
        model,
        labels,
        objective=objective,
        method=config.sample_method,
        steps=config.sample_steps,
        cfg_scale=config.sample_cfg_scale if model.null_label is not None else 1.0,
        precision=config.precision,
    )
    images = to_images(samples.to(next(model.parameters()).device), data.autoencoder)
    path.parent.mkdir(exist_ok=True)
    names = data.class_names[:columns] or [str(label) for label in range(columns)]
    save_grid(path, images, columns, column_labels=names)
