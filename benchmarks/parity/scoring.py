"""How good samples are: digits-FD and KID of digits, FID by Inception of anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from models.data import DataSplits, collect, load_npz, save_grid, to_uint8
from models.data.npz import iterate_images
from models.metrics import fid_scores, load_inception, load_reference, score_samples, train_classifier
from models.metrics.typical import most_typical, save_typical_grid

BATCH_SIZE = 64  # of Inception
GRID_COLUMNS = 8  # of samples that are not digits


@dataclass(frozen=True)
class Score:
    """What one file of samples is worth.

    distance: digits-FD or FID, lower is better; None where nothing to measure it by was given.
    floor: the distance of real images that models may have seen to real ones that they may not; of digits alone: of
        anything else the training images themselves are not at hand.
    kid, kid_error: kernel distance and its standard deviation between random subsets; None where not known.
    kid_floor: of the images of `floor`.
    share_nearer: share of samples nearer to a training image than the median unseen image is; of digits alone.
    inception_score: higher is better; not of digits.
    """

    distance: float | None
    floor: float | None = None
    kid: float | None = None
    kid_error: float | None = None
    kid_floor: float | None = None
    share_nearer: float | None = None
    inception_score: float | None = None


class Scorer(Protocol):
    """Scores files of samples and shows what they look like; `name` is the distance's."""

    name: str

    def score(self, archive: Path) -> Score: ...

    def save_grid(self, path: Path, archives: Mapping[str, Path]) -> None:
        """A PNG with a row of samples per entry, labelled with its name."""


class DigitsScorer:
    """By the features of a classifier, which is trained here, once."""

    name = "digits-FD"

    def __init__(self, data: DataSplits) -> None:
        self.data, self.classifier = data, train_classifier(data)

    def score(self, archive: Path) -> Score:
        images, labels = load_npz(archive)
        scores = score_samples(images, self.data, labels=labels, classifier=self.classifier)
        return Score(
            scores.digits_fd,
            scores.floor,
            scores.kid,
            scores.kid_error,
            scores.kid_floor,
            scores.share_nearer_than_holdout,
        )

    def save_grid(self, path: Path, archives: Mapping[str, Path]) -> None:
        real, labels = collect(self.data.holdout)
        rows = {"real": most_typical(to_uint8(real), labels, self.classifier)}
        for name, archive in archives.items():
            images, labels = load_npz(archive)
            rows[name] = most_typical(images[..., :1], labels, self.classifier)
        save_typical_grid(path, rows)


class FidScorer:
    """FID by DiT's protocol, with Inception and the statistics of the reference batch from local files.

    Args:
        name: what the distance of this many samples is called.
        inception: as `load_inception` takes it; None leaves the distance unmeasured.
        reference: as `load_reference` takes it.
        device: where Inception runs.

    Raises:
        OSError, ValueError: as `load_inception` and `load_reference` do.
    """

    def __init__(self, name: str, inception: str | None, reference: str | None, device: torch.device) -> None:
        self.name, self.device = name, device
        self.inception = None if inception is None else load_inception(inception)
        self.reference = None if reference is None else load_reference(reference)

    def score(self, archive: Path) -> Score:
        if self.inception is None:
            return Score(None)
        images = iterate_images([archive], BATCH_SIZE)
        scores = fid_scores(images, self.inception.to(self.device), self.reference)
        return Score(scores.fid, kid=scores.kid, kid_error=scores.kid_error, inception_score=scores.inception_score)

    def save_grid(self, path: Path, archives: Mapping[str, Path]) -> None:
        rows = [next(iterate_images([archive], GRID_COLUMNS)) for archive in archives.values()]
        save_grid(path, torch.cat(rows), len(rows[0]), row_labels=list(archives))
