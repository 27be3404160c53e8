"""How good samples are, and whether they were merely remembered."""

from models.metrics.features import DigitsClassifier, train_classifier
from models.metrics.fid import FidScores, fid_scores
from models.metrics.frechet import frechet_distance, frechet_distance_of_statistics
from models.metrics.inception import InceptionFeatures, load_inception
from models.metrics.kernel_distance import kernel_distance
from models.metrics.memorisation import nearest_distances, share_nearer
from models.metrics.reference import ReferenceStatistics, load_reference, reference_statistics
from models.metrics.scores import Scores, score_samples
from models.metrics.statistics import RunningGaussian

__all__ = [
    "DigitsClassifier",
    "FidScores",
    "InceptionFeatures",
    "ReferenceStatistics",
    "RunningGaussian",
    "Scores",
    "fid_scores",
    "frechet_distance",
    "frechet_distance_of_statistics",
    "kernel_distance",
    "load_inception",
    "load_reference",
    "nearest_distances",
    "reference_statistics",
    "score_samples",
    "share_nearer",
    "train_classifier",
]
