"""How good samples are: digits-FD and KID of digits, FID by Inception of anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from models.data import DataSplits, collect, load_npz, save_grid, to_uint8
from models.data.npz import iterate_images
from models.metrics import FidScores, fid_scores, load_inception, load_reference, score_samples, train_classifier
from models.metrics.typical import most_typical, save_typical_grid
from models.progress import progress_bar
from models.sampling import to_images

BATCH_SIZE = 64  # of Inception, and of the autoencoder
GRID_COLUMNS = 8  # of samples that are not digits


@dataclass(frozen=True)
class Score:
    """What one file of samples is worth.

    distance: digits-FD or FID, lower is better; None where nothing to measure it by was given.
    floor: the distance of as many training images; None where there are fewer.
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
        data: what was trained on; its images give the floor.
        num_samples: in each file.
        inception: as `load_inception` takes it; None leaves the distance unmeasured.
        reference: as `load_reference` takes it.
        device: where Inception and the autoencoder run.

    Raises:
        OSError, ValueError: as `load_inception` and `load_reference` do.
    """

    def __init__(
        self,
        name: str,
        data: DataSplits,
        num_samples: int,
        inception: str | None,
        reference: str | None,
        device: torch.device,
    ) -> None:
        self.name, self.data, self.num_samples, self.device = name, data, num_samples, device
        self.inception = None if inception is None else load_inception(inception)
        self.reference = None if reference is None else load_reference(reference)

    def score(self, archive: Path) -> Score:
        if self.inception is None:
            return Score(None)
        scores, floor = self._scores(iterate_images([archive], BATCH_SIZE)), self._floor
        return Score(
            scores.fid,
            floor=floor and floor.fid,
            kid=scores.kid,
            kid_error=scores.kid_error,
            kid_floor=floor and floor.kid,
            inception_score=scores.inception_score,
        )

    def _scores(self, batches: Iterator[Tensor]) -> FidScores:
        return fid_scores(batches, self.inception.to(self.device), self.reference)

    @cached_property
    def _floor(self) -> FidScores | None:
        """Of as many training images; None where there are fewer, since FID of fewer is higher."""
        if len(self.data.train) < self.num_samples:
            return None
        batches, total = real_images(self.data, self.num_samples, self.device), -(-self.num_samples // BATCH_SIZE)
        return self._scores(progress_bar(batches, desc="real images", total=total, unit="batch"))

    def save_grid(self, path: Path, archives: Mapping[str, Path]) -> None:
        rows = {"real": next(real_images(self.data, GRID_COLUMNS, self.device))}
        for name, archive in archives.items():
            rows[name] = next(iterate_images([archive], GRID_COLUMNS))
        columns = min(map(len, rows.values()))
        save_grid(path, torch.cat([row[:columns] for row in rows.values()]), columns, row_labels=list(rows))


def real_images(data: DataSplits, count: int, device: torch.device) -> Iterator[Tensor]:
    """Training images from front to back at even distances, uint8 (n, H, W, 3) on the CPU.

    Latents are drawn, from a seed, and decoded. Mirror images are among them only if `data` draws those.
    """
    for places in (torch.arange(count) * len(data.train) // count).split(BATCH_SIZE):
        items, _ = default_collate([data.train[place] for place in places.tolist()])
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(places[0]))
            images = data.draw(items.to(device))
        yield to_images(images, data.autoencoder)
