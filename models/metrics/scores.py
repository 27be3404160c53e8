"""Samples scored against a dataset: digits-FD and KID beside their floors, and the signs of memorisation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.data import DataSplits, check_labels, collect, from_uint8, rank_in_class, to_uint8
from models.metrics.features import DigitsClassifier, train_classifier
from models.metrics.frechet import frechet_distance
from models.metrics.kernel_distance import kernel_distance
from models.metrics.memorisation import nearest_distances, share_nearer


@dataclass(frozen=True)
class Scores:
    """What `score_samples` found. Distances between images are Euclidean over pixels in [-1, 1].

    digits_fd: Frechet distance between classifier features of the samples and of the held-out images; lower is better.
    floor: the same distance for as many training images, what a perfect model of the training images would reach.
    kid: kernel distance between the same features; lower is better, 0 is as near as held-out images are to each other.
    kid_error: its standard deviation between random subsets.
    kid_floor: the kernel distance of the training images that `floor` takes.
    num_samples: samples scored, as many as there are held-out images.
    nearest_train_distance: median distance from a sample to its nearest training image.
    nearest_train_distance_holdout: the same for held-out images, what fresh real images would show.
    share_nearer_than_holdout: share of samples nearer to a training image than the median held-out image; 0.5 is fresh.
    classifier_accuracy: share of held-out images that the classifier gets right.
    label_agreement: share of samples that the classifier takes for the class they were asked for; None without labels.
    """

    digits_fd: float
    floor: float
    kid: float
    kid_error: float
    kid_floor: float
    num_samples: int
    nearest_train_distance: float
    nearest_train_distance_holdout: float
    share_nearer_than_holdout: float
    classifier_accuracy: float
    label_agreement: float | None


@torch.no_grad()
def score_samples(
    images: Tensor,
    data: DataSplits,
    *,
    labels: Tensor | None = None,
    classifier: DigitsClassifier | None = None,
) -> Scores:
    """Score samples against the held-out images of `data`.

    The held-out images are balanced over the classes, so sample a class-conditional model with as many per class (50
    for the digits). All images pass through uint8, so that a tensor scores the same as the file made from it.

    Args:
        images: as many samples as held-out images (500 for the digits), since a Frechet distance depends on the count:
            float (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C) with C as in the data or grey repeated to 3.
        data: the dataset that the model was trained on.
        labels: (N,) integers, the classes the samples were asked for, if any.
        classifier: from `train_classifier(data)`, to score several models with one training; trained here if None.

    Raises:
        TypeError: `images` or `labels` of a wrong type.
        ValueError: nothing held out, a wrong image size, number of channels, number of samples or label.
    """
    if data.holdout is None:
        raise ValueError(
            f"{data.name} holds no images out that samples could be scored against: "
            "for FID pass --inception and --reference to models.evaluate"
        )
    images = images if isinstance(images, Tensor) and images.dtype == torch.uint8 else to_uint8(images)
    samples = from_uint8(images.cpu(), channels=data.channels)
    holdout, holdout_labels = collect(data.holdout)
    if samples.shape[1:] != holdout.shape[1:]:
        raise ValueError(
            f"images must be {data.image_size}x{data.image_size} like {data.name}, "
            f"got {samples.shape[2]}x{samples.shape[3]}; score samples of a model trained on that dataset"
        )
    if len(samples) != len(holdout):
        raise ValueError(
            f"images must hold {len(holdout)} samples, as many as {data.name} holds out, got {len(samples)}: "
            f"draw {len(holdout)}, {len(holdout) // data.num_classes} of each class"
        )
    if labels is not None:
        check_labels(labels, data.num_classes)
        if len(labels) != len(samples):
            raise ValueError(f"labels must have one entry for each of the {len(samples)} images, got {len(labels)}")

    train, train_labels = collect(data.train)
    # The first of each class: both splits are in a fixed shuffled order, so this is a fixed random choice.
    reference = train[rank_in_class(train_labels, data.num_classes) < len(holdout) // data.num_classes]
    train, holdout, reference = (from_uint8(to_uint8(split)) for split in (train, holdout, reference))

    classifier = train_classifier(data) if classifier is None else classifier
    holdout_features = classifier.features(holdout)
    features, reference_features = classifier.features(samples), classifier.features(reference)
    kid, kid_error = kernel_distance(features, holdout_features)
    sample_distances, holdout_distances = nearest_distances(samples, train), nearest_distances(holdout, train)
    return Scores(
        digits_fd=frechet_distance(features, holdout_features),
        floor=frechet_distance(reference_features, holdout_features),
        kid=kid,
        kid_error=kid_error,
        kid_floor=kernel_distance(reference_features, holdout_features)[0],
        num_samples=len(samples),
        nearest_train_distance=sample_distances.quantile(0.5).item(),
        nearest_train_distance_holdout=holdout_distances.quantile(0.5).item(),
        share_nearer_than_holdout=share_nearer(sample_distances, holdout_distances),
        classifier_accuracy=_accuracy(classifier, holdout, holdout_labels),
        label_agreement=None if labels is None else _accuracy(classifier, samples, labels.cpu()),
    )


def _accuracy(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    return (classifier(images).argmax(1) == labels).double().mean().item()
