"""Score a file of samples: `python -m models.evaluate --samples samples.npz --output scores.json`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.data import image_shape, iterate_images, load_dataset, load_samples, sample_files
from models.metrics import FidScores, Scores, fid_scores, load_inception, load_reference, score_samples
from models.options import build_config, config_parser, option, require
from models.training.loading import pick_device


@dataclass(frozen=True)
class EvaluateConfig:
    """All options of `python -m models.evaluate`.

    Raises:
        ValueError: one of `inception` and `reference` without the other, or a number out of its range.
    """

    samples: str = option(
        "samples/samples.npz",
        ".npz of `models.sample`, or the folder of its parts: 500 images for the digits, 50 of each class; for FID as "
        "many as the figure it is compared with, 50,000 in papers",
    )
    data: str = option("digits", "dataset that the model was trained on; of no effect on FID, which has --reference")
    inception: str | None = option(None, "for FID: local file weights-inception-2015-12-05-6726825d.pth")
    reference: str | None = option(None, "for FID: ADM's reference batch, such as VIRTUAL_imagenet256_labeled.npz")
    output: str | None = option(None, "JSON file for the scores; none is written without it")
    batch_size: int = option(64, "images at a time through Inception: a matter of speed and memory", alias="batch")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "of Inception; auto takes the GPU if there is one")

    def __post_init__(self) -> None:
        missing = "inception" if self.inception is None else "reference"
        both_or_none = (self.inception is None) == (self.reference is None)
        require(self, missing, both_or_none, "given too, since FID needs --inception and --reference")
        require(self, "batch_size", self.batch_size >= 1, "at least 1")


def evaluate(config: EvaluateConfig) -> Scores | FidScores:
    """Score the samples that `config` names and write the JSON that it asks for, in a new folder if need be.

    Raises:
        OSError: there is no such file, or the scores can't be written.
        ValueError: an unknown dataset, a damaged file, parts that are no whole run, or samples that do not fit.
    """
    output = None if config.output is None else Path(config.output)
    if output is not None:  # before the work: where nothing can be written is told at once
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(f"{output} is a folder: --output is the file for the scores")
    if config.inception is not None:
        scores = _fid(config)
        against = {"inception": config.inception, "reference": config.reference}
    else:
        data = load_dataset(config.data)
        images, labels = load_samples(config.samples)
        height, width = images.shape[1:3]
        if config.data == "digits" and (height, width) != (8, 8):  # the default, perhaps not meant
            raise ValueError(
                f"images must be 8x8 as the digits are, got {height}x{width} in {config.samples}: for FID give "
                "--inception and --reference, for another dataset --data"
            )
        scores, against = score_samples(images, data, labels=labels), {"data": config.data}
    if output is not None:
        record = {"samples": config.samples, **against, **dataclasses.asdict(scores)}
        output.write_text(json.dumps(record, indent=2) + "\n")
    return scores


def _fid(config: EvaluateConfig) -> FidScores:
    from tqdm import tqdm

    files = sample_files(config.samples)
    total = -(-sum(image_shape(path)[0] for path in files) // config.batch_size)
    inception = load_inception(config.inception, pick_device(config.device))
    reference = load_reference(config.reference, inception)
    batches = iterate_images(files, config.batch_size)
    return fid_scores(tqdm(batches, "Inception", total, unit="batch", disable=None), inception, reference)


def format_scores(scores: Scores | FidScores) -> str:
    """The scores as an aligned table of two columns and a remark."""
    rows = _fid_rows(scores) if isinstance(scores, FidScores) else _digits_rows(scores)
    return "\n".join(f"{name:<24}{value:>8}   {remark}" for name, value, remark in rows)


def _fid_rows(scores: FidScores) -> list[tuple[str, str, str]]:
    rows = [("FID", f"{scores.fid:.3f}", f"{scores.num_samples} samples against the reference; lower is better")]
    if scores.sfid is not None:
        rows.append(("sFID", f"{scores.sfid:.3f}", "the same of spatial features"))
    rows.append(("Inception Score", f"{scores.inception_score:.3f}", "mean over splits of 5000; higher is better"))
    if scores.kid is not None:
        rows.append(("KID", f"{scores.kid:.5f}", f"lower is better; s.d. of subsets {scores.kid_error:.5f}"))
    else:
        rows.append(("KID", "-", "needs single images, and the reference has none (arr_0), only their statistics"))
    return rows


def _digits_rows(scores: Scores) -> list[tuple[str, str, str]]:
    rows = [
        ("digits-FD", f"{scores.digits_fd:.3f}", f"{scores.num_samples} samples against the held-out images; lower"),
        ("floor", f"{scores.floor:.3f}", "as many training images against the held-out images"),
        ("KID", f"{scores.kid:.4f}", f"kernel distance of the same features; s.d. of subsets {scores.kid_error:.4f}"),
        ("KID floor", f"{scores.kid_floor:.4f}", "of the training images that the floor takes"),
        ("nearest training image", f"{scores.nearest_train_distance:.3f}", "median distance in pixels; 0 is a copy"),
        ("  of held-out images", f"{scores.nearest_train_distance_holdout:.3f}", "what fresh real images have"),
        ("nearer than held-out", f"{scores.share_nearer_than_holdout:.1%}", "50% is fresh, 100% leans on copies"),
        ("classifier accuracy", f"{scores.classifier_accuracy:.1%}", "on the held-out images"),
    ]
    if scores.label_agreement is not None:
        rows.append(("label agreement", f"{scores.label_agreement:.1%}", "samples the classifier reads as asked"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 2 where it asks for something impossible."""
    try:
        parser = config_parser(EvaluateConfig, prog="python -m models.evaluate", description="Score a file of samples.")
        print(format_scores(evaluate(build_config(EvaluateConfig, parser.parse_args(arguments)))))
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
