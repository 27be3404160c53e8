"""The Frechet distance between two sets of features, each taken as a Gaussian."""

import torch
from torch import Tensor

# As parts of the largest entry or eigenvalue. A covariance stored in float32 is off by some 1e-8.
ASYMMETRY = NEGATIVITY = 1e-6


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64, covariances unbiased.

    With S = R^T R from a QR of the centred rows, the trace of the root is the sum of the singular values of R_a R_b^T:
    no covariance is formed and no complex matrix root is taken, so fewer rows than columns are no trouble.
    The estimate shrinks as rows are added: compare only distances between sets of the same sizes.

    Args:
        features_a: (N, D) float, N at least 2.
        features_b: (M, D) float, M at least 2, on the same device.

    Raises:
        TypeError: a set is not a floating-point tensor.
        ValueError: a set is not 2-d, has fewer than 2 rows or a value that is not finite, or the widths differ.

    Source: D. Dowson and B. Landau, "The Frechet distance between multivariate normal distributions" (1982);
    M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017).
    """
    check_features(features_a, features_b)
    mean_a, root_a = _mean_and_root(features_a)
    mean_b, root_b = _mean_and_root(features_b)
    trace_of_root = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * trace_of_root
    return max(distance.item(), 0.0)  # rounding can leave -1e-14 for equal sets


def frechet_distance_of_statistics(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """`frechet_distance` from means and covariances, in float64; singular covariances are no trouble.

    With S = R^T R from its eigenvalues, the trace of the root is the sum of the singular values of R_a R_b^T.
    Eigenvalues below what rounding leaves of 0 count as 0.

    Args:
        mean_a, mean_b: (D,) float.
        covariance_a, covariance_b: (D, D) float, symmetric, without negative eigenvalues.

    Raises:
        ValueError: another shape, or the widths differ; a value that is not finite; a covariance that is not
            symmetric, or has an eigenvalue below -1e-6 of the largest.
    """
    check_statistics("a", mean_a, covariance_a)
    check_statistics("b", mean_b, covariance_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"mean_a and mean_b must have the same width, got {len(mean_a)} and {len(mean_b)}; "
            "take both from the same extractor"
        )
    root_a, root_b = _root("covariance_a", covariance_a), _root("covariance_b", covariance_b)
    trace_of_root = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    traces = covariance_a.double().trace() + covariance_b.double().trace()
    distance = (mean_a.double() - mean_b.double()).square().sum() + traces - 2 * trace_of_root
    return max(distance.item(), 0.0)  # rounding, as above


def check_statistics(name: str, mean: Tensor, covariance: Tensor) -> None:
    """Raises ValueError unless mean is (D,) and covariance (D, D), both finite, the latter symmetric."""
    if mean.ndim != 1 or len(mean) < 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mean_{name} and covariance_{name} must be (D,) and (D, D), "
            f"got shapes {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    for kind, values in (("mean", mean), ("covariance", covariance)):
        if not values.isfinite().all():
            raise ValueError(f"{kind}_{name} holds NaN or infinity; look for them in what it was computed from")
    asymmetry, largest = (covariance - covariance.mT).abs().max().item(), covariance.abs().max().item()
    if asymmetry > ASYMMETRY * largest:
        raise ValueError(
            f"covariance_{name} must be symmetric, got entries that differ by {asymmetry:.3g} from their mirror images"
        )


def _root(name: str, covariance: Tensor) -> Tensor:
    """(D, D) -> R (rank, D) with R^T R = covariance, float64."""
    covariance = covariance.detach().double()
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    largest = eigenvalues.abs().max()
    if eigenvalues[0] < -NEGATIVITY * largest:
        raise ValueError(
            f"{name} must have no negative eigenvalue, got {eigenvalues[0].item():.3g} "
            f"beside {largest.item():.3g}: it is no covariance"
        )
    kept = eigenvalues > len(eigenvalues) * torch.finfo(torch.float64).eps * largest
    return eigenvalues[kept].sqrt()[:, None] * vectors[:, kept].mT


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> mean (D,) and R (min(N, D), D) with R^T R the unbiased covariance, float64."""
    features = features.detach().double()
    mean = features.mean(0)
    root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
    return mean, root


def check_features(features_a: Tensor, features_b: Tensor) -> None:
    """Raises TypeError or ValueError unless both are finite float tensors of at least 2 rows and of one width."""
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name} must be a float tensor, got {kind}")
        if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
            raise ValueError(f"{name} must be (at least 2 rows, width), got shape {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; look for them in the images it was made from")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features_a and features_b must have the same width, got {features_a.shape[1]} and "
            f"{features_b.shape[1]}; take both from the same extractor"
        )
