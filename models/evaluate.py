"""Score a file of samples: `python -m models.evaluate --samples samples.npz --output scores.json`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.data import load_dataset, load_npz
from models.metrics import Scores, score_samples


@dataclass
class EvaluateConfig:
    """Score samples against held-out images: digits-FD beside its floor, and the signs of memorisation.

    Args:
        samples: .npz as `python -m models.sample` writes it: 500 images for the digits, 50 of each class.
        data: name of the dataset that the model was trained on.
        output: JSON file for the scores; none is written without it.
    """

    samples: Path
    data: str = "digits"
    output: Path | None = None


def evaluate(config: EvaluateConfig) -> Scores:
    """Score the file that `config` names and write the JSON that it asks for, in a new folder if need be.

    Raises:
        FileNotFoundError: there is no such sample file.
        ValueError: an unknown dataset, a damaged file, or samples that do not fit the dataset.
    """
    data = load_dataset(config.data)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
    images, labels = load_npz(config.samples)
    scores = score_samples(images, data, labels=labels)
    if config.output is not None:
        record = {"samples": str(config.samples), "data": config.data, **dataclasses.asdict(scores)}
        config.output.write_text(json.dumps(record, indent=2) + "\n")
    return scores


def format_scores(scores: Scores) -> str:
    """The scores as an aligned table of two columns and a remark."""
    rows = [
        ("digits-FD", f"{scores.digits_fd:.3f}", f"{scores.num_samples} samples against the held-out images; lower"),
        ("floor", f"{scores.floor:.3f}", "as many training images against the held-out images"),
        ("nearest training image", f"{scores.nearest_train_distance:.3f}", "median distance in pixels; 0 is a copy"),
        ("  of held-out images", f"{scores.nearest_train_distance_holdout:.3f}", "what fresh real images have"),
        ("nearer than held-out", f"{scores.share_nearer_than_holdout:.1%}", "50% is fresh, 100% leans on copies"),
        ("classifier accuracy", f"{scores.classifier_accuracy:.1%}", "on the held-out images"),
    ]
    if scores.label_agreement is not None:
        rows.append(("label agreement", f"{scores.label_agreement:.1%}", "samples the classifier reads as asked"))
    return "\n".join(f"{name:<24}{value:>8}   {remark}" for name, value, remark in rows)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `evaluate`; bad input ends with one line that says what to do."""
    from jsonargparse import auto_cli

    config = auto_cli(EvaluateConfig, as_positional=False, prog="python -m models.evaluate", args=args)
    try:
        print(format_scores(evaluate(config)))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
