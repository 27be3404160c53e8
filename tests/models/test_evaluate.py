"""`python -m models.evaluate`: the table, the JSON and its refusals."""

import json
import re

import numpy as np
import pytest
import torch

from models.data import load_dataset, save_npz, to_uint8
from models.evaluate import main
from tests.models.tiny_inception import TinyInception


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
        ((500, 1, 16, 16), None, [], "must be 8x8 as the digits are, got 16x16 .* for FID give --inception"),
        ((20, 1, 8, 8), None, [], "must hold 500 samples"),
        ((500, 1, 8, 8), torch.full((500,), 11), [], r"labels must be in \[0, 9\]"),
    ],
)
def test_evaluate_ends_with_one_line_on_bad_input(tmp_path, capsys, size, labels, arguments, message):
    save_npz(tmp_path / "samples.npz", to_uint8(torch.zeros(size)), labels)
    assert main(["--samples", str(tmp_path / "samples.npz"), *arguments]) == 2
    assert re.match(f"error: .*{message}.*\n$", capsys.readouterr().err)


def test_evaluate_says_that_it_cannot_write_before_it_scores(tmp_path, capsys, monkeypatch):
    save_npz(tmp_path / "samples.npz", to_uint8(torch.zeros(500, 1, 8, 8)), None)
    monkeypatch.setattr("models.evaluate.score_samples", lambda *_, **__: pytest.fail("scored"))
    for output in (tmp_path, tmp_path / "samples.npz" / "scores.json"):
        assert main(["--samples", str(tmp_path / "samples.npz"), "--output", str(output)]) == 2
        assert "error: " in capsys.readouterr().err


def test_evaluate_refuses_a_missing_and_a_damaged_file(tmp_path, capsys):
    assert main(["--samples", str(tmp_path / "samples.npz")]) == 2
    assert re.search(r"No such file.*samples\.npz", capsys.readouterr().err)
    (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04 not really")
    assert main(["--samples", str(tmp_path / "samples.npz")]) == 2
    assert "not a whole npz file" in capsys.readouterr().err


def test_evaluate_takes_the_folder_of_a_runs_parts(tmp_path, capsys):
    images, labels = load_dataset("digits").holdout.tensors
    for first, last in ((0, 300), (300, 500)):
        origin = {"first": first, "request": {}}
        path = tmp_path / f"samples-{first:06d}.npz"
        save_npz(path, to_uint8(images[first:last]), labels[first:last], origin=origin)
    assert main(["--samples", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "digits-FD                  0.000   500 samples" in table and "label agreement" in table
    (tmp_path / "samples-000000.npz").unlink()
    assert main(["--samples", str(tmp_path)]) == 2
    assert "image 0 is missing" in capsys.readouterr().err


@pytest.fixture
def fid_words(tmp_path, monkeypatch):
    """Options for FID of 40 samples against 60 other images, of a stand-in for Inception's 24 million weights."""
    monkeypatch.setattr("models.evaluate.load_inception", lambda path, device: TinyInception().to(device))
    generator = torch.Generator().manual_seed(0)
    for name, count in (("samples", 40), ("reference", 60)):
        pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=generator)
        save_npz(tmp_path / f"{name}.npz", pixels.to(torch.uint8))
    words = {
        "samples": "samples.npz",
        "reference": "reference.npz",
        "inception": "weights.pth",
        "output": "scores.json",
    }
    return [word for name, file in words.items() for word in (f"--{name}", str(tmp_path / file))]


def test_evaluate_gives_fid_where_it_has_inception_and_a_reference(fid_words, tmp_path, capsys):
    assert main([*fid_words, "--device", "cpu", "--batch-size", "7"]) == 0
    table = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (
        scores["num_samples"] == 40 and scores["reference"] == str(tmp_path / "reference.npz") and "data" not in scores
    )
    assert scores["fid"] > 0.1 and scores["sfid"] > 0.1 and scores["inception_score"] > 1
    assert f"FID                     {scores['fid']:8.3f}   40 samples" in table
    assert f"sFID                    {scores['sfid']:8.3f}" in table
    assert f"Inception Score         {scores['inception_score']:8.3f}" in table
    assert f"KID                     {scores['kid']:8.5f}   lower is better; s.d." in table
    assert f"of subsets {scores['kid_error']:.5f}" in table
    assert "digits" not in table


def test_evaluate_says_why_there_is_no_kid(fid_words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.metrics.reference.FEATURES", 16)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(16), sigma=np.eye(16))
    assert main(fid_words) == 0
    table = capsys.readouterr().out
    assert re.search(r"KID +- +needs single images, and the reference has none", table) and "sFID" not in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inception", "weights.pth"], "reference must be given too, since FID needs --inception and --reference"),
        (["--reference", "reference.npz"], "inception must be given too, since FID needs --inception and --reference"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--inception", "missing.pth", "--reference", "missing.npz"], "No such file.*missing.pth"),
    ],
)
def test_evaluate_refuses_half_of_what_fid_needs(tmp_path, capsys, words, message):
    save_npz(tmp_path / "samples.npz", torch.zeros(3, 8, 8, 3, dtype=torch.uint8))
    assert main(["--samples", str(tmp_path / "samples.npz"), *words]) == 2
    assert re.search(f"^error: .*{message}.*\n$", capsys.readouterr().err)


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--samples",
        "50 of each class",
        "--data",
        "--output",
        "JSON file for the scores",
        "--inception",
        "--reference",
    ):
        assert words in text
