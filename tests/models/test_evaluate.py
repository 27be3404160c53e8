"""`python -m models.evaluate`: the table, the JSON and its refusals."""

import json
import re

import pytest
import torch

from models.data import load_dataset, save_npz, to_uint8
from models.evaluate import main


def test_evaluate_prints_a_table_and_writes_the_scores(tmp_path, capsys):
    images, labels = load_dataset("digits").holdout.tensors
    save_npz(tmp_path / "samples.npz", to_uint8(images), labels)
    files = ["--samples", str(tmp_path / "samples.npz"), "--output", str(tmp_path / "new" / "scores.json")]
    assert main([*files, "--data", "digits"]) == 0
    table = capsys.readouterr().out
    scores = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert scores["digits_fd"] == pytest.approx(0, abs=1e-9)
    assert scores["num_samples"] == 500 and scores["data"] == "digits"
    assert scores["label_agreement"] == scores["classifier_accuracy"] >= 0.97
    assert f"digits-FD                  {scores['digits_fd']:.3f}" in table
    assert f"floor                      {scores['floor']:.3f}" in table
    assert "label agreement" in table


@pytest.mark.parametrize(
    ("size", "labels", "arguments", "message"),
    [
        ((500, 1, 8, 8), None, ["--data", "digts"], "unknown dataset 'digts'; did you mean 'digits'"),
        ((500, 1, 16, 16), None, [], "must be 8x8"),
        ((20, 1, 8, 8), None, [], "must hold 500 samples"),
        ((500, 1, 8, 8), torch.full((500,), 11), [], r"labels must be in \[0, 9\]"),
    ],
)
def test_evaluate_ends_with_one_line_on_bad_input(tmp_path, capsys, size, labels, arguments, message):
    save_npz(tmp_path / "samples.npz", to_uint8(torch.zeros(size)), labels)
    assert main(["--samples", str(tmp_path / "samples.npz"), *arguments]) == 2
    assert re.match(f"error: .*{message}.*\n$", capsys.readouterr().err)


def test_evaluate_refuses_a_missing_and_a_damaged_file(tmp_path, capsys):
    assert main(["--samples", str(tmp_path / "samples.npz")]) == 2
    assert re.search(r"No such file.*samples\.npz", capsys.readouterr().err)
    (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04 not really")
    assert main(["--samples", str(tmp_path / "samples.npz")]) == 2
    assert "not a whole npz file" in capsys.readouterr().err


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--samples", "50 of each class", "--data", "--output", "JSON file for the scores"):
        assert words in text
