"""The Frechet distance, the classifier behind digits-FD, and what the scores say of good and of spoiled samples."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.data import load_dataset, rank_in_class, to_uint8
from models.metrics import (
    frechet_distance,
    frechet_distance_of_statistics,
    nearest_distances,
    score_samples,
    share_nearer,
    train_classifier,
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(digits)


@pytest.fixture(scope="module")
def fresh_train(digits):
    """500 training images and labels, 50 of each class, none of them among the floor's."""
    images, labels = digits.train.tensors
    rank = rank_in_class(labels, 10)
    chosen = (rank >= 50) & (rank < 100)
    return images[chosen], labels[chosen]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = normal(50, 8)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_a_shift_and_of_a_scaling():
    features, shift = normal(200, 6), torch.arange(6.0)
    assert frechet_distance(features, features + shift) == pytest.approx(shift.square().sum().item())
    centred = features - features.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * features.var(0).sum().item())


def test_frechet_distance_follows_the_formula_with_a_matrix_root():
    a, b = normal(300, 10) @ normal(10, 10, seed=1), normal(200, 10, seed=2) @ normal(10, 10, seed=3) + 0.5
    root_trace = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(expected.item())
    assert frechet_distance(b.float(), a.float()) == pytest.approx(expected.item(), rel=1e-4)


def test_frechet_distance_with_fewer_rows_than_columns():
    a, b = normal(3, 20), normal(5, 20, seed=1)
    rotation = torch.linalg.qr(normal(20, 20, seed=2)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b))
    assert frechet_distance(a, a + 2) == pytest.approx(80)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), ValueError, "same width, got 3 and 2"),
        (torch.zeros(1, 3), torch.zeros(4, 3), ValueError, "features_a must be .*at least 2 rows"),
        (torch.zeros(4, 3), torch.zeros(0, 3), ValueError, "features_b must be .*at least 2 rows"),
        (torch.zeros(4, 3), torch.zeros(4, 3, 1), ValueError, r"\(4, 3, 1\)"),
        (torch.zeros(4, 3), torch.full((4, 3), math.inf), ValueError, "features_b holds NaN or infinity"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3), TypeError, "features_a must be a float tensor"),
    ],
)
def test_frechet_distance_refuses(a, b, error, message):
    with pytest.raises(error, match=message):
        frechet_distance(a, b)


def spread(*eigenvalues, seed=0):
    """A covariance with these eigenvalues, float64."""
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def between(mean_a, covariance_a, mean_b, covariance_b):
    means = (torch.tensor(mean, dtype=torch.float64) for mean in (mean_a, mean_b))
    return frechet_distance_of_statistics(next(means), covariance_a, next(means), covariance_b)


def test_frechet_distance_of_statistics_in_closed_forms():
    eye, covariance = torch.eye(3, dtype=torch.float64), spread(0.5, 2.0, 7.0)
    assert between([1, 2, 3], covariance, [1, 2, 3], covariance) == pytest.approx(0, abs=1e-12)
    assert between([1, 2, 3], covariance, [4, 2, -1], covariance) == pytest.approx(25)
    assert between([0], torch.tensor([[9.0]]), [2], torch.tensor([[4.0]])) == pytest.approx(4 + (3 - 2) ** 2)
    diagonal = torch.diag(torch.tensor([1.0, 4.0, 25.0], dtype=torch.float64))
    assert between([0, 0, 0], diagonal, [0, 0, 0], eye) == pytest.approx(0 + 1 + 16)
    same_basis = spread(2.0, 8.0, 7.0)  # commutes with covariance: the roots' difference, squared
    expected = (0.5**0.5 - 2**0.5) ** 2 + (2**0.5 - 8**0.5) ** 2
    assert between([0, 0, 0], covariance, [0, 0, 0], same_basis) == pytest.approx(expected)


def test_frechet_distance_of_singular_covariances():
    zero, line, other = torch.zeros(3, 3), spread(0.0, 0.0, 4.0), spread(0.0, 9.0, 0.0, seed=1)
    assert between([0, 0, 0], zero, [0, 3, 4], zero) == pytest.approx(25)
    assert between([0, 0, 0], line, [0, 0, 0], zero) == pytest.approx(4)
    assert between([0, 0, 0], line, [0, 0, 0], line) == pytest.approx(0, abs=1e-12)
    # Of rank 1 each, s u u^T and t v v^T: the root's trace is sqrt(s t) |u.v|.
    u, v = torch.linalg.eigh(line).eigenvectors[:, -1], torch.linalg.eigh(other).eigenvectors[:, -1]
    assert between([0, 0, 0], line, [0, 0, 0], other) == pytest.approx(4 + 9 - 2 * 6 * (u @ v).abs().item())


@pytest.mark.parametrize("rows", [(300, 200), (20, 9)], ids=["of full rank", "fewer rows than columns"])
def test_frechet_distance_of_statistics_is_that_of_features_and_of_scipy(rows):
    """SciPy's root of the product, a Schur method; a singular product it can't take without an offset."""
    linalg = pytest.importorskip("scipy.linalg")
    width = 24
    a = normal(rows[0], width) @ normal(width, width, seed=1)
    b = normal(rows[1], width, seed=2) @ normal(width, width, seed=3) + 0.5
    statistics = (a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    distance = frechet_distance_of_statistics(*statistics)
    assert distance == pytest.approx(frechet_distance(a, b), rel=1e-9)
    offset = 0 if rows[1] > width else 1e-9 * torch.eye(width, dtype=torch.float64)
    root = linalg.sqrtm(((statistics[1] + offset) @ (statistics[3] + offset)).numpy())
    traces = statistics[1].trace() + statistics[3].trace() - 2 * root.real.trace()
    expected = (statistics[0] - statistics[2]).square().sum() + traces
    assert distance == pytest.approx(expected.item(), rel=1e-9 if rows[1] > width else 1e-4)


def test_frechet_distance_takes_rounding_for_what_it_is():
    """A covariance of rank 3 stored in float32 has eigenvalues below 0, of -1e-9 of the largest."""
    covariance = (normal(4, 40) @ spread(*[1.0] * 40)).T.cov()
    rounded = covariance.float()
    assert torch.linalg.eigvalsh(rounded.double())[0] < -1e-10
    mean = torch.zeros(40)
    assert frechet_distance_of_statistics(mean, rounded, mean, covariance) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (
            torch.zeros(3),
            torch.eye(4),
            r"mean_b and covariance_b must be \(D,\) and \(D, D\), got shapes \(3,\) and \(4, 4\)",
        ),
        (torch.zeros(1, 3), torch.eye(3), r"got shapes \(1, 3\)"),
        (torch.zeros(4), torch.eye(4), "the same width, got 3 and 4; take both from the same extractor"),
        (torch.full((3,), math.nan), torch.eye(3), "mean_b holds NaN or infinity"),
        (torch.zeros(3), torch.eye(3) * math.inf, "covariance_b holds NaN or infinity"),
        (torch.zeros(3), torch.eye(3) + torch.ones(3, 3).triu(1) * 0.01, "covariance_b must be symmetric, .* by 0.01 "),
        (torch.zeros(3), torch.diag(torch.tensor([1.0, 2.0, -0.001])), "no negative eigenvalue, got -0.001 beside 2:"),
        (torch.zeros(3), -torch.eye(3), "no negative eigenvalue, got -1 beside 1:"),
    ],
)
def test_frechet_distance_refuses_statistics_that_are_none(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance_of_statistics(torch.zeros(3), torch.eye(3), mean, covariance)


def test_nearest_distances_are_exact_for_copies():
    references = normal(40, 1, 8, 8).float() * 100
    images = torch.stack([references[7], references[3] + 1])
    assert nearest_distances(images, references).tolist() == pytest.approx([0.0, 8.0], abs=1e-5)
    assert nearest_distances(images, references)[0] == 0
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\) and \(3, 1, 4, 4\)"):
        nearest_distances(images, torch.zeros(3, 1, 4, 4))


def test_share_nearer_is_a_half_for_the_measure_itself():
    unseen = torch.arange(1.0, 11.0)
    assert share_nearer(unseen, unseen) == 0.5
    assert share_nearer(torch.zeros(4), unseen) == 1
    assert share_nearer(torch.tensor([1.0, 20.0, 20.0, 20.0]), unseen) == 0.25


def test_classifier_reads_the_held_out_digits(digits, classifier):
    images, labels = digits.holdout.tensors
    assert (classifier(images).argmax(1) == labels).double().mean() >= 0.97
    features = classifier.features(images)
    assert features.shape == (500, 64) and features.dtype == torch.float64 and not features.requires_grad


def test_classifier_depends_on_nothing_but_the_data(digits, classifier):
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        with torch.inference_mode():
            again = train_classifier(digits)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.get_rng_state())
    images = digits.holdout.tensors[0]
    torch.testing.assert_close(again.features(images), classifier.features(images), rtol=1e-7, atol=1e-7)


def test_the_floor_is_low_and_the_held_out_images_score_zero(digits, classifier):
    images, labels = digits.holdout.tensors
    scores = score_samples(images, digits, labels=labels, classifier=classifier)
    assert scores.digits_fd == pytest.approx(0, abs=1e-9)
    assert 0.1 < scores.floor < 1
    assert scores.num_samples == 500
    assert scores.nearest_train_distance == scores.nearest_train_distance_holdout > 1
    assert scores.share_nearer_than_holdout == 0.5
    assert scores.label_agreement == scores.classifier_accuracy >= 0.97


def test_copies_of_training_images_score_like_the_floor_but_show_as_copies(digits, classifier, fresh_train):
    images, labels = fresh_train
    scores = score_samples(images, digits, labels=labels, classifier=classifier)
    assert scores.digits_fd < 2 * scores.floor
    assert scores.nearest_train_distance == 0 and scores.share_nearer_than_holdout == 1


def gaussian_pixels(train):
    """500 draws from the Gaussian fitted to all pixels of the training images, with their full covariance."""
    pixels = train.flatten(1).double()
    root = torch.linalg.cholesky(pixels.T.cov() + 1e-6 * torch.eye(64, dtype=torch.float64))
    return (pixels.mean(0) + normal(500, 64) @ root.T).reshape(500, 1, 8, 8)


def blurred(images):
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(F.pad(images, (1, 1, 1, 1), value=-1.0), torch.outer(kernel, kernel)[None, None])


SPOILED = {
    "noise": lambda images, labels, train: normal(500, 1, 8, 8),
    "blurred": lambda images, labels, train: blurred(images),
    "independent pixels": lambda images, labels, train: train.mean(0) + train.std(0) * normal(500, 1, 8, 8),
    "gaussian pixels": lambda images, labels, train: gaussian_pixels(train),
    "one class": lambda images, labels, train: images[labels == 3].repeat(10, 1, 1, 1),
    "nine classes": lambda images, labels, train: torch.cat([images[labels != 3], images[labels == 4]]),
    "a few images": lambda images, labels, train: images[::50].repeat(50, 1, 1, 1),
    "noisy": lambda images, labels, train: images + 0.3 * normal(500, 1, 8, 8),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_samples_score_above_the_floor(kind, digits, classifier, fresh_train):
    samples = SPOILED[kind](*fresh_train, digits.train.tensors[0])
    scores = score_samples(samples, digits, classifier=classifier)
    assert scores.digits_fd > 3 * scores.floor
    assert scores.label_agreement is None


def test_floats_grey_and_repeated_grey_score_the_same(digits, classifier, fresh_train):
    samples = fresh_train[0] + 0.1 * normal(500, 1, 8, 8)
    pixels = to_uint8(samples)
    scores = score_samples(samples, digits, classifier=classifier)
    assert score_samples(pixels, digits, classifier=classifier) == scores
    assert score_samples(pixels.expand(-1, -1, -1, 3), digits, classifier=classifier) == scores


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(500, 1, 16, 16), None, ValueError, "must be 8x8 like digits, got 16x16"),
        (torch.zeros(500, 3, 8, 8) + torch.tensor([0.0, 0.5, 1]).view(3, 1, 1), None, ValueError, "in colour"),
        (torch.zeros(499, 1, 8, 8), None, ValueError, "must hold 500 samples.*got 499: draw 500, 50 of each class"),
        (torch.zeros(1000, 1, 8, 8), None, ValueError, "must hold 500 samples.*got 1000"),
        (torch.zeros(0, 1, 8, 8), None, ValueError, "at least one image"),
        (torch.zeros(500, 8, 8, 1, dtype=torch.int64), None, TypeError, "int64"),
        (torch.zeros(500, 1, 8, 8), torch.full((500,), 10), ValueError, r"labels must be in \[0, 9\]"),
        (torch.zeros(500, 1, 8, 8), torch.zeros(5, dtype=torch.int64), ValueError, "each of the 500 images, got 5"),
        (torch.full((500, 1, 8, 8), math.nan), None, ValueError, "NaN"),
    ],
)
def test_score_samples_refuses(images, labels, error, message, digits, classifier):
    with pytest.raises(error, match=message):
        score_samples(images, digits, labels=labels, classifier=classifier)
