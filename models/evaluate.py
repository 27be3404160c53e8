"""Score a file of samples: `python -m models.evaluate --samples samples.npz --output scores.json`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.data import load_dataset, load_npz
from models.metrics import Scores, score_samples
from models.training.config import build_config, config_parser, option


@dataclass(frozen=True)
class EvaluateConfig:
    """All options of `python -m models.evaluate`."""

    samples: str = option("samples/samples.npz", ".npz of `models.sample`: 500 images for the digits, 50 of each class")
    data: str = option("digits", "dataset that the model was trained on")
    output: str | None = option(None, "JSON file for the scores; none is written without it")


def evaluate(config: EvaluateConfig) -> Scores:
    """Score the file that `config` names and write the JSON that it asks for, in a new folder if need be.

    Raises:
        FileNotFoundError: there is no such sample file.
        ValueError: an unknown dataset, a damaged file, or samples that do not fit the dataset.
    """
    data = load_dataset(config.data)
    images, labels = load_npz(Path(config.samples))
    scores = score_samples(images, data, labels=labels)
    if config.output is not None:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"samples": config.samples, "data": config.data, **dataclasses.asdict(scores)}
        output.write_text(json.dumps(record, indent=2) + "\n")
    return scores


def format_scores(scores: Scores) -> str:
    """The scores as an aligned table of two columns and a remark."""
    rows = [
        ("digits-FD", f"{scores.digits_fd:.3f}", f"{scores.num_samples} samples against the held-out images; lower"),
        ("floor", f"{scores.floor:.3f}", "as many training images against the held-out images"),
        ("KID", f"{scores.kid:.4f}", f"plus or minus {scores.kid_error:.4f}; kernel distance of the same features"),
        ("KID floor", f"{scores.kid_floor:.4f}", "of the training images that the floor takes"),
        ("nearest training image", f"{scores.nearest_train_distance:.3f}", "median distance in pixels; 0 is a copy"),
        ("  of held-out images", f"{scores.nearest_train_distance_holdout:.3f}", "what fresh real images have"),
        ("nearer than held-out", f"{scores.share_nearer_than_holdout:.1%}", "50% is fresh, 100% leans on copies"),
        ("classifier accuracy", f"{scores.classifier_accuracy:.1%}", "on the held-out images"),
    ]
    if scores.label_agreement is not None:
        rows.append(("label agreement", f"{scores.label_agreement:.1%}", "samples the classifier reads as asked"))
    return "\n".join(f"{name:<24}{value:>8}   {remark}" for name, value, remark in rows)


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
