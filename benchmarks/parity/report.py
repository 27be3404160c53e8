"""What a comparison found, in words: the table, a verdict for each mixture of experts, and what they are worth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.parity.scoring import Score
from benchmarks.parity.statistics import Comparison, compare, spread
from models.markdown import markdown_table

# FID-50K, see NOTES_OF_FID.
PUBLISHED = {
    "DSMoE-L-E16": 9.80,
    "DSMoE-L-E48": 9.19,
    "DiffMoE-L-E16": 11.16,
    "JiT-B/16": 4.81,
    "JiTMoE-B/16-E16": 4.23,
}
NOT_MEASURED = "not measured"
NOTES = """Behind ± is the standard deviation over the seeds, of weights, data order, training noise and samples alike.
The intervals are of paired differences, each at 95% by itself: among many comparisons one may be wrong.
loss: mean squared error of the velocity over the last tenth of training; between objectives it does not compare."""
NOTES_OF_DIGITS = """digits-FD: Frechet distance of 500 samples to the 500 held-out images, lower is better. Its
features are a small classifier's: it is not FID. floor: of 500 training images, what a perfect model of them reaches.
KID: kernel distance of the same features, mean of the seeds; 0 is best. s.d.: between the random subsets that it is a
mean of, which overlap: no standard error.
nearer to training images: share of samples nearer to one than the median held-out image is; 50% is fresh."""
NOTES_OF_FID = """FID by DiT's protocol, lower is better. The .npz of every run is what the ADM evaluator reads.
floor: of as many training images, unmirrored, latents decoded: what a model of them can aim at. KID: of the same
features, over 100 subsets of 1,000, mean of the seeds; a reference of statistics alone has none.
published: FID-50K of 256x256 ImageNet as the DSMoE and JiTMoE authors report it (github.com/yhlleo/EfficientMoE), the
latent models at guidance 1 after 700,000 steps of 512 images by 250 steps of Euler, DiffMoE as they reproduced it;
their Inception reads images unrounded and resized another way, by how much that moves FID is not measured. JiT and
JiTMoE are guided within an interval after 200 epochs and measured against other statistics: do not compare those."""


@dataclass(frozen=True)
class SeedResult:
    """One run: `loss` is the mean squared error over the last tenth of its steps."""

    seed: int
    loss: float
    score: Score


@dataclass(frozen=True)
class ModelResult:
    """All seeds of a model; `baseline` is the dense model that it is compared with, None for a dense one."""

    model: str
    baseline: str | None
    activated_parameters: int
    total_parameters: int
    steps: int
    seeds: tuple[SeedResult, ...]

    @property
    def distances(self) -> dict[int, float]:
        """By seed; empty where nothing measured them."""
        return {seed.seed: seed.score.distance for seed in self.seeds if seed.score.distance is not None}


def comparisons(results: Sequence[ModelResult]) -> dict[str, Comparison | None]:
    """Of each model with a baseline, by its name; None where fewer than two seeds of both were measured."""
    by_name = {result.model: result for result in results}
    return {
        result.model: compare(result.distances, by_name[result.baseline].distances)
        for result in results
        if result.baseline is not None
    }


def format_report(results: Sequence[ModelResult], distance: str) -> str:
    """Table, verdicts and notes as Markdown.

    Args:
        results: every baseline that they name is among them.
        distance: what it is called, "digits-FD" or such as "FID-50K".
    """
    is_digits = distance == "digits-FD"
    table = _digits_table(results, distance) if is_digits else _fid_table(results, distance)
    verdicts = "\n".join(f"- {line}" for line in _verdicts(results, distance))
    notes = f"{NOTES_OF_DIGITS if is_digits else NOTES_OF_FID}\n{NOTES}"
    return "\n\n".join(part for part in (table, verdicts, notes) if part)


def _digits_table(results: Sequence[ModelResult], distance: str) -> str:
    heading = [*_HEADING, distance, "floor", "KID", "KID floor", "nearer to training images"]
    rows = []
    for result in results:
        scores = [seed.score for seed in result.seeds]
        kid, deviation, nearer = (
            statistics.mean(getattr(score, name) for score in scores) for name in ("kid", "kid_error", "share_nearer")
        )
        row = [
            f"{scores[0].floor:.2f}",
            f"{kid:.3f} (s.d. {deviation:.3f})",
            f"{scores[0].kid_floor:.3f}",
            f"{nearer:.0%}",
        ]
        rows.append([*_cells(result), *row])
    return markdown_table(heading, rows)


def _fid_table(results: Sequence[ModelResult], distance: str) -> str:
    """The published models that were not trained stand there too."""
    rows = []
    for result in results:
        scores = [seed.score for seed in result.seeds]
        row = [
            *(_mean_of(scores, "floor", 2), _mean_of(scores, "kid", 4), _mean_of(scores, "kid_floor", 4)),
            *(_mean_of(scores, "inception_score", 1), _published(result.model)),
        ]
        rows.append([*_cells(result), *row])
    trained = {result.model for result in results}
    for model in PUBLISHED:
        if model not in trained:
            rows.append([model, *[""] * (len(_HEADING) - 1), *[NOT_MEASURED] * 5, _published(model)])
    heading = [*_HEADING, distance, "floor", "KID", "KID floor", "Inception Score", "published"]
    return markdown_table(heading, rows)


_HEADING = ["model", "activated", "total", "steps", "seeds", "loss"]


def _cells(result: ModelResult) -> list[str]:
    """The cells of `_HEADING` and of the distance."""
    return [
        result.model,
        f"{result.activated_parameters / 1e6:.2f} M",
        f"{result.total_parameters / 1e6:.2f} M",
        f"{result.steps}",
        f"{len(result.seeds)}",
        _with_spread([seed.loss for seed in result.seeds], 4),
        _with_spread(list(result.distances.values()), 2),
    ]


def _mean_of(scores: Sequence[Score], name: str, digits: int) -> str:
    values = [getattr(score, name) for score in scores]
    return NOT_MEASURED if None in values else f"{statistics.mean(values):.{digits}f}"


def _with_spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return NOT_MEASURED
    deviation = spread(values)
    return f"{statistics.mean(values):.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _published(model: str) -> str:
    return f"{PUBLISHED[model]:.2f}" if model in PUBLISHED else ""


def _verdicts(results: Sequence[ModelResult], distance: str) -> list[str]:
    by_name = {result.model: result for result in results}
    lines = []
    for model, comparison in comparisons(results).items():
        result, baseline = by_name[model], by_name[by_name[model].baseline]
        start = f"{model} against {baseline.model}: "
        if not (result.distances and baseline.distances):
            lines.append(f"{start}{NOT_MEASURED}.")
        elif comparison is None:
            difference = statistics.mean(result.distances.values()) - statistics.mean(baseline.distances.values())
            lines.append(
                f"{start}no verdict. {distance} differs by {difference:+.2f}, but one seed tells no spread: "
                "it takes two at least, --seeds 3."
            )
        else:
            lines.append(f"{start}{_verdict(comparison, distance)}")
    return lines


def _verdict(comparison: Comparison, distance: str) -> str:
    numbers = (
        f"Over {comparison.seeds} pairs of runs of one seed {distance} differs by {comparison.difference:+.2f}, "
        f"standard error {comparison.standard_error:.2f}, 95% interval {comparison.low:+.2f} to {comparison.high:+.2f}"
    )
    if comparison.verdict == "level":
        return (
            f"**level**, the interval contains 0. {numbers}; a difference below {comparison.resolution:.2f} could not "
            "have been shown."
        )
    return f"**{comparison.verdict}**, the interval excludes 0. {numbers}."
