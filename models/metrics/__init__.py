"""How good samples are, and whether they were merely remembered."""

from models.metrics.features import DigitsClassifier, train_classifier
from models.metrics.frechet import frechet_distance
from models.metrics.kernel_distance import kernel_distance
from models.metrics.memorisation import nearest_distances, share_nearer
from models.metrics.scores import Scores, score_samples

__all__ = [
    "DigitsClassifier",
    "Scores",
    "frechet_distance",
    "kernel_distance",
    "nearest_distances",
    "score_samples",
    "share_nearer",
    "train_classifier",
]
