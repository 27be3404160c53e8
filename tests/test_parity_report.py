"""What the report of a comparison says."""

import pytest

from benchmarks.fid_parity import dense_counterpart
from benchmarks.parity.report import ModelResult, SeedResult, comparisons, format_report
from benchmarks.parity.scoring import Score


def result(model, distances, **score):
    seeds = [SeedResult(seed, 0.4 + 0.1 * seed, Score(distance, **score)) for seed, distance in enumerate(distances)]
    return ModelResult(model, dense_counterpart(model), 1_000_000, 2_000_000, 30, tuple(seeds))


DIGITS_SCORE = {"floor": 0.37, "kid": 0.01, "kid_error": 0.12, "kid_floor": -0.03, "share_nearer": 0.45}


def test_the_report_of_digits():
    dense = result("DiT-digits", [0.70, 0.71, 0.75], **DIGITS_SCORE)
    moe = result("DSMoE-digits", [0.50, 0.51, 0.52], **DIGITS_SCORE)
    lines = format_report([dense, moe], "digits-FD").splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        *("DSMoE-digits", "1.00 M", "2.00 M", "30", "3", "0.5000 ± 0.1000", "0.51 ± 0.01"),
        *("0.37", "0.010 (s.d. 0.120)", "-0.030", "45%"),
    ]
    (verdict,) = (line for line in lines if line.startswith("- "))
    assert verdict.startswith("- DSMoE-digits against DiT-digits: **better**, the interval excludes 0.")
    assert (
        "Over 3 pairs of runs of one seed digits-FD differs by -0.21, standard error 0.01, 95% interval -0.2" in verdict
    )
    assert comparisons([dense, moe])["DSMoE-digits"].difference == pytest.approx(-0.21)


def test_a_report_of_level_models_says_what_would_have_shown():
    report = format_report(
        [result("DiT-digits", [0.7, 0.8], **DIGITS_SCORE), result("DSMoE-digits", [0.75, 0.8], **DIGITS_SCORE)],
        "digits-FD",
    )
    assert "**level**, the interval contains 0" in report
    assert "a difference below 0." in report


def test_one_seed_gets_no_verdict():
    report = format_report(
        [result(name, [0.7], **DIGITS_SCORE) for name in ("DiT-digits", "DSMoE-digits")], "digits-FD"
    )
    assert "DSMoE-digits against DiT-digits: no verdict. digits-FD differs by +0.00" in report and "±" in report
    assert "| 0.70      |" in report


def test_the_report_of_fid_has_the_published_figures_beside_what_was_not_measured():
    results = [result("DiT-L/2", [None]), result("DSMoE-L-E16", [None])]
    report = format_report(results, "FID-50K")
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in report.splitlines()[2:8]
    }
    assert rows["DSMoE-L-E16"][-6:] == [*["not measured"] * 5, "9.80"]
    assert rows["DSMoE-L-E48"][-6:] == [*["not measured"] * 5, "9.19"]
    assert rows["DiffMoE-L-E16"][-1] == "11.16" and rows["DiT-L/2"][-1] == ""
    assert rows["JiT-B/16"][-1] == "4.81" and rows["JiTMoE-B/16-E16"][-1] == "4.23"
    assert "DSMoE-L-E16 against DiT-L/2: not measured." in report
    measured = format_report([result("DiT-L/2", [12.0], inception_score=90.5)], "FID-50K")
    assert "12.00" in measured and "90.5" in measured
