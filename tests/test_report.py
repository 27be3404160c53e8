"""The tables and plots of a run of the benchmarks."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from benchmarks.files import MARKED

RUN = {
    "device": "NVIDIA H200",
    "compute_capability": "9.0",
    "torch": "2.11.0",
    "command": "pytest benchmarks",
    "ceilings": {"copy_bytes_per_second": 4e12, "product_flops_per_second": 8e14},
}


def timed(provider: str, ms: float, *, name: str = "DSMoE-L-E16", op: str = "experts", **facts: object) -> dict:
    known = {"op": op, "name": name, "direction": "forward+backward", "provider": provider, "weights_dtype": "bfloat16"}
    known |= {"ceiling": False, "flops": 4 * 10**11, "least_bytes": 10**9, "p20_ms": 0.9 * ms, "p80_ms": 1.2 * ms}
    return {"extra_info": known | facts, "stats": {"median": ms / 1e3}}


def skipped(provider: str, reason: str, outcome: str = "skipped") -> dict:
    return {"test": f"test[{provider}]", "op": "experts", "name": "DSMoE-L-E16", "direction": "forward"} | {
        "provider": provider,
        "outcome": outcome,
        "reason": reason,
    }


DATA = {
    "datetime": "2026-11-21T12:00:00",
    "run": RUN,
    "benchmarks": [
        timed("triton", 1.5, saved_mib=289.0),
        timed("dense", 1.0, ceiling=True, saved_mib=448.0),
        timed("triton, float32 masters", 1.8, weights_dtype="float32"),
        timed("dense, float32 masters", 1.2, ceiling=True, weights_dtype="float32"),
        timed("triton", 0.02, name="DSMoE-S-E48", flops=0),
        timed("copy", 0.025, op="permute", flops=0),
        {"extra_info": {}, "stats": {"median": 1.0}},
    ],
    "not_run": [
        skipped("loop", "no such package"),
        skipped("scattermoe", "no such package"),
        skipped("torch", "result is wrong by 0.1: no time", "failed"),
    ],
}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_are_by_group_and_case_from_fast_to_slow() -> None:
    found = report.groups(DATA)
    assert list(found) == ["experts, forward+backward", "permute, forward+backward"]
    rows = [(row.case, row.provider) for row in found["experts, forward+backward"]]
    first = ["dense", "dense, float32 masters", "triton", "triton, float32 masters"]
    assert rows == [*(("DSMoE-L-E16", provider) for provider in first), ("DSMoE-S-E48", "triton")]


def test_ratios_are_to_the_ceiling_with_such_weights() -> None:
    rows = {(row.case, row.provider): row.ratio for row in report.groups(DATA)["experts, forward+backward"]}
    assert rows["DSMoE-L-E16", "triton"] == pytest.approx(1.5)
    assert rows["DSMoE-L-E16", "triton, float32 masters"] == pytest.approx(1.5)
    assert rows["DSMoE-S-E48", "triton"] is None


def test_the_later_of_two_times_counts() -> None:
    rows = report.groups({**DATA, "benchmarks": [timed("triton", 3.0), timed("dense", 1.0), timed("triton", 2.0)]})
    assert [(row.provider, row.ms) for row in rows["experts, forward+backward"]] == [("dense", 1.0), ("triton", 2.0)]


def test_a_rate_is_the_larger_share_of_a_limit() -> None:
    rows = {(row.case, row.provider): row.rate for group in report.groups(DATA).values() for row in group}
    assert rows["DSMoE-L-E16", "dense"] == "400 TFLOP/s, 50%"  # bytes: 1,000 GB/s, 25 %
    assert rows["DSMoE-L-E16", "copy"] == "40 TB/s, 1000%"
    (row,) = report.groups({"benchmarks": [timed("triton", 1.0)]})["experts, forward+backward"]
    assert row.rate == ""  # no limit is known


def test_the_largest_batch_is_compared_by_the_image() -> None:
    """The one that holds more images takes longer, and is faster."""
    records = [timed("triton", 500.0, images=512), timed("grouped_mm", 370.0, images=256)]
    rows = report.groups({"benchmarks": records})["experts, forward+backward"]
    assert [row.provider for row in rows] == ["triton", "grouped_mm"]


def test_what_the_host_launches_is_marked() -> None:
    on_gpu = {"compute_capability": "9.0"}
    records = [timed("triton", 1.0, captured=True, **on_gpu), timed("loop", 9.0, captured=False, **on_gpu)]
    text = report.tables({"run": RUN, "benchmarks": records})
    assert {row[1] for row in cells(text)[2:]} == {"loop \N{DAGGER}", "triton"}
    assert text.endswith(f"{MARKED}.")
    records = [timed("triton", 1.0, captured=False, compute_capability=None)]  # on a CPU nothing is captured
    assert "\N{DAGGER}" not in report.tables({"benchmarks": records})


def test_what_neither_computes_nor_moves_has_no_rate() -> None:
    (row,) = report.groups({"run": RUN, "benchmarks": [timed("permute", 1.0, flops=0, least_bytes=0)]}).popitem()[1]
    assert row.rate == ""


def test_a_time_of_nothing_spoils_no_table() -> None:
    records = [timed("dense", 0.0, ceiling=True), timed("triton", 1.0)]
    dense, triton = report.groups({"run": RUN, "benchmarks": records})["experts, forward+backward"]
    assert dense.rate == "" and triton.ratio is None


def test_the_table() -> None:
    head, rule, *rows = cells(report.table(report.groups(DATA)["experts, forward+backward"]))
    assert "peak MiB" not in head and head[-1] == "kept MiB"  # no one has a peak
    assert {len(row) for row in (rule, *rows)} == {len(head)}
    assert [row[0] for row in rows] == ["DSMoE-L-E16", "", "", "", "DSMoE-S-E48"]
    assert rows[0][1:] == ["*dense*", "1.00", "0.900 to 1.20", "1.00", "400 TFLOP/s, 50%", "448.0"]


def test_all_of_a_run_in_words() -> None:
    text = report.tables(DATA)
    assert "Measured on NVIDIA H200 on 2026-11-21 at 12:00; torch 2.11.0." in text
    assert "copy 4000 GB/s, product 800 TFLOP/s" in text and "small sizes" not in text
    assert "- **failed**: experts, DSMoE-L-E16, forward, torch: result is wrong by 0.1: no time" in text
    assert "- no such package: 2 benchmarks, of loop; scattermoe" in text
    on_a_cpu = report.tables({**DATA, "run": {"device": "a CPU"}, "not_run": []})
    assert "Without a GPU" in on_a_cpu and "Not timed" not in on_a_cpu


@pytest.mark.parametrize(
    ("ms", "shown"), [(123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123"), (0.0, "0.0000")]
)
def test_three_digits(ms, shown) -> None:
    assert report.digits(ms) == shown


def test_files_that_it_writes(tmp_path, capsys) -> None:
    image = pytest.importorskip("matplotlib.image")
    source = tmp_path / "h200.json"
    source.write_text(json.dumps(DATA))
    assert report.main([str(source)]) == 0
    names = ["report.md", "experts-forward-and-backward.png", "permute-forward-and-backward.png"]
    paths = [tmp_path / "h200" / name for name in names]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert "## permute, forward+backward" in paths[0].read_text()
    for path in paths[1:]:
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.01


def test_pictures_of_a_cpu_say_that_cases_are_small() -> None:
    assert report.machine(DATA) == "NVIDIA H200"
    assert report.machine({"run": {"device": "a CPU"}}).startswith("a CPU: small sizes, not those of the models")


def test_what_is_no_file(tmp_path, capsys) -> None:
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
