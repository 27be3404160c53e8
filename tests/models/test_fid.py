"""FID and its company: statistics that are summed up batch by batch, ADM's reference batches, the scores of samples."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from models.data import save_npz
from models.metrics import (
    RunningGaussian,
    fid_scores,
    frechet_distance,
    kernel_distance,
    load_reference,
    reference_statistics,
)
from models.metrics.fid import SPLIT, _SplitScore
from tests.models.tiny_inception import TinyInception


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0, brightest=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, brightest, (count, 8, 8, 3), generator=generator).to(torch.uint8)


def gaussian(*batches):
    statistics = RunningGaussian()
    for batch in batches:
        statistics.update(batch)
    return statistics


def assert_same(found, mean, covariance, count, **tolerance):
    torch.testing.assert_close(found.mean, mean, **tolerance)
    torch.testing.assert_close(found.covariance, covariance, **tolerance)
    assert found.count == count


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [64, 36], [3, 90, 7]])
def test_running_gaussian_is_that_of_all_rows(sizes):
    features = normal(100, 5) @ normal(5, 5, seed=1) + 3
    statistics = gaussian(*features.split(sizes))
    assert_same(statistics, features.mean(0), features.T.cov(), 100, rtol=1e-12, atol=1e-12)
    ones = gaussian(features[:, :1])
    assert ones.covariance.shape == (1, 1)


def test_running_gaussian_keeps_digits_far_from_zero():
    """Sums of squares minus the square of the sum would have none left: 1e18 has an ulp of 128."""
    features = normal(1000, 4)
    statistics = gaussian(*(features + 1e9).split(64))
    torch.testing.assert_close(statistics.covariance, features.T.cov(), rtol=1e-6, atol=1e-6)


def test_running_gaussian_refuses():
    statistics = gaussian(normal(3, 4))
    for features in (normal(3, 5), normal(4), normal(0, 4)):
        with pytest.raises(ValueError, match=r"features must be \(n, 4\)"):
            statistics.update(features)
    with pytest.raises(ValueError, match="NaN"):
        statistics.update(torch.full((2, 4), math.nan))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        _ = gaussian(normal(1, 4)).covariance
    assert statistics.count == 3


@pytest.fixture
def narrow(monkeypatch):
    """Reference files of 16 and 12 features in place of 2048 and 2023."""
    monkeypatch.setattr("models.metrics.reference.FEATURES", 16)
    monkeypatch.setattr("models.metrics.reference.SPATIAL_FEATURES", 12)
    pool, spatial = normal(50, 16), normal(40, 12, seed=1)
    return {
        "mu": pool.mean(0).numpy(),
        "sigma": pool.T.cov().numpy(),
        "mu_s": spatial.mean(0).numpy(),
        "sigma_s": spatial.T.cov().numpy(),
    }


def test_load_reference_reads_what_adm_ships(narrow, tmp_path):
    np.savez(tmp_path / "reference.npz", arr_0=images(7).numpy(), **narrow)
    reference = load_reference(tmp_path / "reference.npz")
    assert reference.features is None
    for name, key in zip(("mean", "covariance", "spatial_mean", "spatial_covariance"), narrow, strict=True):
        assert np.array_equal(getattr(reference, name).numpy(), narrow[key]), name
    network = TinyInception()
    measured = load_reference(tmp_path / "reference.npz", network)
    assert torch.equal(measured.mean, reference.mean), "the file's own statistics, which are of more images"
    assert torch.equal(measured.features, network(images(7)).features)


def test_load_reference_without_spatial_statistics_and_in_float32(narrow, tmp_path):
    np.savez(tmp_path / "reference.npz", mu=narrow["mu"], sigma=narrow["sigma"].astype(np.float32))
    reference = load_reference(tmp_path / "reference.npz", TinyInception())
    assert reference.spatial_mean is None and reference.spatial_covariance is None and reference.features is None
    assert reference.covariance.dtype == torch.float64


def test_load_reference_of_images_alone(tmp_path):
    save_npz(tmp_path / "real.npz", images(70))
    network = TinyInception()
    reference, outputs = load_reference(tmp_path / "real.npz", network), network(images(70))
    torch.testing.assert_close(reference.covariance, outputs.features.double().T.cov())
    torch.testing.assert_close(reference.spatial_mean, outputs.spatial.double().mean(0))
    torch.testing.assert_close(reference.features, outputs.features)
    with pytest.raises(ValueError, match=r"expected the keys 'mu' and 'sigma', got \['arr_0'\]; pass .* the network"):
        load_reference(tmp_path / "real.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": None}, r"sigma must be floats \(16, 16\), .* got nothing"),
        ({"mu": None}, r"mu must be floats \(16,\), .* got nothing"),
        ({"mu_s": None}, r"mu_s must be floats \(12,\), .* got nothing"),
        ({"mu": np.zeros(64)}, r"mu must be floats \(16,\), statistics of Inception's features, got float64 \(64,\)"),
        ({"sigma": np.zeros((16, 16), np.int64)}, r"sigma must be floats .*int64"),
        ({"mu": np.full(16, np.nan)}, "mean_reference holds NaN"),
        ({"sigma": np.triu(np.ones((16, 16)))}, "covariance_reference must be symmetric"),
        ({"sigma_s": np.full((12, 12), np.inf)}, "covariance_reference holds NaN or infinity"),
    ],
)
def test_load_reference_refuses(narrow, tmp_path, change, message):
    arrays = {name: array for name, array in (narrow | change).items() if array is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz: {message}"):
        load_reference(tmp_path / "bad.npz")


def test_load_reference_refuses_damaged_and_missing_files(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="not a whole npz file"):
        load_reference(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        load_reference(tmp_path / "missing.npz")


def test_scores_are_the_distances_of_the_features():
    network, real, samples = TinyInception(), images(60), images(40, seed=1, brightest=200)
    scores = fid_scores(samples.split(16), network, reference_statistics([real], network))
    a, b = network(samples), network(real)
    assert scores.fid == pytest.approx(frechet_distance(a.features, b.features), rel=1e-6)
    assert scores.sfid == pytest.approx(frechet_distance(a.spatial, b.spatial), rel=1e-6)
    assert (scores.kid, scores.kid_error) == kernel_distance(a.features, b.features, subset_size=40)
    assert scores.num_samples == 40 and scores.fid > 0.01
    probabilities = a.logits.double().softmax(1)
    divergence = (probabilities * (probabilities / probabilities.mean(0)).log()).sum(1).mean()
    assert scores.inception_score == pytest.approx(divergence.exp().item())
    same = fid_scores([real], network, reference_statistics(real.split(7), network))
    assert same.fid == pytest.approx(0, abs=1e-9) and same.sfid == pytest.approx(0, abs=1e-9)


def test_scores_do_not_depend_on_batches_or_order():
    network, samples = TinyInception(), images(50)
    reference = reference_statistics([images(60, seed=1)], network)
    whole = fid_scores([samples], network, reference)
    shuffled = fid_scores(samples[torch.randperm(50)].split(7), network, dataclasses.replace(reference, features=None))
    assert shuffled.fid == pytest.approx(whole.fid, rel=1e-6)
    assert shuffled.inception_score == pytest.approx(whole.inception_score, rel=1e-6)


def test_no_kid_and_no_sfid_where_the_reference_has_no_ground_for_them():
    network = TinyInception()
    measured = reference_statistics([images(60)], network)
    reference = dataclasses.replace(measured, features=None, spatial_mean=None, spatial_covariance=None)
    scores = fid_scores([images(40, seed=1)], network, reference)
    assert (scores.kid, scores.kid_error, scores.sfid) == (None, None, None)
    assert scores.fid == fid_scores([images(40, seed=1)], network, measured).fid


def test_too_few_samples_are_warned_of():
    """17 rows are the fewest with a covariance of full rank in 16 dimensions."""
    network = TinyInception()
    reference = reference_statistics([images(60)], network)
    with pytest.warns(UserWarning, match="FID of 16 samples is far too high.* fewer than 17"):
        fid_scores([images(16, seed=1)], network, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid_scores([images(17, seed=1)], network, reference)
    with pytest.warns(UserWarning, match="FID of 1 samples"), pytest.raises(ValueError, match="at least 2 rows, got 1"):
        fid_scores([images(1)], network, reference)


def inception_score(*batches):
    score = _SplitScore()
    for batch in batches:
        score.update(batch)
    return score.mean()


def test_inception_score_in_closed_forms():
    certain = 100 * torch.eye(4).repeat(5, 1)
    assert inception_score(certain) == pytest.approx(4), "sure of each image, and all classes alike"
    assert inception_score(torch.zeros(9, 4)) == pytest.approx(1), "sure of none"
    assert inception_score(certain[:1].repeat(9, 1)) == pytest.approx(1), "of one class only"


def test_inception_score_is_the_mean_over_splits():
    """As ADM takes it, the last and shorter split with the weight of the others."""
    logits = 3 * normal(SPLIT + 1000, 5)
    logits[SPLIT:, 0] += 4
    splits = [inception_score(logits[:SPLIT]), inception_score(logits[SPLIT:])]
    assert abs(splits[0] - splits[1]) > 0.2
    for size in (999, SPLIT, len(logits)):
        assert inception_score(*logits.split(size)) == pytest.approx(sum(splits) / 2)
