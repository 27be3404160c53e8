"""From a run of the benchmarks to what "auto" takes."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from benchmarks import prefer
from benchmarks.cases import all_cases
from benchmarks.registry import BOTH, FORWARD, GPU
from diffmoe_kernels import measured


def record(op: str, name: str, backend: str | None, ms: float, **changes: object) -> dict:
    facts = {
        **{"op": op, "name": name, "direction": BOTH, "backend": backend, "compiled": False, "published_size": True},
        **{"dtype": "bfloat16", "weights_dtype": "bfloat16", "T": 16384, "D": 1024, "I": 2048, "E": 16, "K": 2},
    }
    return {"extra_info": facts | changes, "stats": {"median": ms / 1e3}}


def run(*records: dict) -> dict:
    return {"run": {"compute_capability": "9.0", "device": "NVIDIA H200"}, "benchmarks": list(records)}


WIDE = "bfloat16, many rows, wide, training"


def test_the_fastest_over_a_class() -> None:
    data = run(
        record("experts", "L-E16", "triton", 2.0),
        record("experts", "L-E16", "torch", 3.0),
        record("experts", "3B-E16", "triton", 5.0, I=2880),
        record("experts", "3B-E16", "torch", 4.0, I=2880),  # 12 against 10: triton
        record("experts", "L-E48", "triton", 1.0, I=448, E=48, K=5),
        record("experts", "L-E48", "torch", 0.9, I=448, E=48, K=5),
        record("router_topk", "S-E48", "triton", 0.02, direction=FORWARD),
        record("router_topk", "S-E48", "reference", 0.3, direction=FORWARD),
    )
    table = prefer.rows(data, "h200.json")
    found = {(row["op"], row["shape_class"]): row for row in table if not row["compiled"]}
    compiled = [{**row, "compiled": False} for row in table if row["compiled"]]
    assert compiled == list(found.values())  # as nothing was timed compiled
    assert {key: row["fastest"] for key, row in found.items()} == {
        ("experts", WIDE): "triton",
        ("experts", "bfloat16, many rows, narrow, training"): "torch",
        ("router_topk", "many tokens"): "triton",
    }
    row = found["experts", WIDE]
    assert row["cases"] == [
        {"name": "3B-E16, forward+backward", "ms": {"torch": 4.0, "triton": 5.0}},
        {"name": "L-E16, forward+backward", "ms": {"torch": 3.0, "triton": 2.0}},
    ]
    assert row["source"] == "h200.json" and row["capability"] == "9.0"
    assert found["router_topk", "many tokens"]["cases"][0]["ms"] == {"torch": 0.3, "triton": 0.02}


@pytest.mark.parametrize(
    "changes",
    [{"backend": None}, {"published_size": False}, {"weights_dtype": "float32"}, {"op": "mlp"}],
)
def test_what_says_nothing_about_a_choice(changes) -> None:
    other = record("experts", "L-E16", "torch", 3.0) | {}
    other["extra_info"] |= changes
    assert prefer.rows(run(record("experts", "L-E16", "triton", 2.0), other), "f") == []


def test_without_a_time_of_pytorch_nothing_is_preferred() -> None:
    """As a run leaves it that ended before it got to that, in one case of the class too."""
    ours = [record("unpermute", "L", "triton", 0.06), record("unpermute", "L", "cuda", 0.05)]
    assert prefer.rows(run(*ours), "file") == []
    assert (
        prefer.rows(run(*ours, record("unpermute", "M", "torch", 0.1), record("unpermute", "M", "cuda", 0.05)), "")
        == []
    )


def test_a_time_of_nothing_wins_nothing() -> None:
    """Of a median of 0, shorter than the clock tells, nobody knows how short it was."""
    nothing, rival = record("experts", "L-E16", "triton", 0.0), record("experts", "L-E16", "torch", 3.0)
    assert prefer.rows(run(nothing, rival), "f") == []


def test_every_choice_can_be_measured(monkeypatch) -> None:
    """Each op that asks the table has cases on a GPU, with a rival; those of tokens of both classes."""
    asked = set()
    kept = {one: sys.modules[one] for one in sys.modules if one.startswith("diffmoe_kernels.ops.")}
    monkeypatch.setattr(measured, "fastest", lambda op, *_, **__: asked.add(op) or False)
    for name, module in kept.items():
        if hasattr(module, "fastest"):
            spec = importlib.util.find_spec(name)
            fresh = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(fresh)
    known = {}
    for case in all_cases(GPU):
        for provider, how in case.providers.items():
            facts = case.facts(provider, GPU)
            if how.backend and not how.masters and case.op in asked:
                known.setdefault((case.op, prefer.shape_class(facts)), set()).add(how.backend)
    assert {op for op, _ in known} == asked > {"experts", "grouped_gemm", "gated_residual"}
    assert all(found is not None and len(backends) > 1 for (_, found), backends in known.items())
    for op in asked & {*prefer.TOKENS, *prefer.MOVEMENT}:
        assert {found.split()[-2] for one, found in known if one == op} == {"few", "many"}, op


def test_under_a_compiler_the_rival_is_what_it_compiles() -> None:
    """Its fastest; another case's time in eager mode does not stand in for it."""
    data = run(
        record("adaln", "L", "triton", 0.03),
        record("adaln", "L", "torch", 0.2),
        record("adaln", "L", "torch", 0.018, compiled=True),
        record("adaln", "L", "torch", 0.05, compiled=True),
        record("permute", "L", "triton", 0.3),
        record("permute", "L", "torch", 0.1, compiled=True),
    )
    found = {(row["op"], row["compiled"]): row for row in prefer.rows(data, "f")}
    assert {key: row["fastest"] for key, row in found.items()} == {
        ("adaln", False): "triton",
        ("adaln", True): "torch",
        ("permute", True): "torch",
    }
    assert found["adaln", True]["cases"][0]["ms"] == {"torch": 0.018, "triton": 0.03}


def test_a_run_without_a_gpu_is_refused(tmp_path, capsys) -> None:
    file, table = tmp_path / "cpu.json", tmp_path / "measured.json"
    file.write_text(json.dumps({"run": {"compute_capability": None, "device": "a CPU"}, "benchmarks": []}))
    assert prefer.main([str(file), "--table", str(table)]) == 2
    assert "cpu.json: expected a run on a GPU, got one on a CPU" in capsys.readouterr().err
    assert prefer.main([str(tmp_path / "none.json"), "--table", str(table)]) == 2
    assert not table.exists()


@pytest.mark.parametrize("content", ["{", "{}", '[{"op": "experts"}]'])
def test_a_table_that_is_none_is_left_as_it_is(content, tmp_path, capsys) -> None:
    file, table = tmp_path / "h200.json", tmp_path / "measured.json"
    file.write_text(json.dumps(run(record("experts", "L", "triton", 2.0), record("experts", "L", "torch", 3.0))))
    table.write_text(content)
    assert prefer.main([str(file), "--table", str(table)]) == 2
    assert "measured.json: expected a list of measured rows" in capsys.readouterr().err
    assert table.read_text() == content


def test_new_rows_replace_old_ones(tmp_path, capsys) -> None:
    file, table = tmp_path / "h200.json", tmp_path / "measured.json"
    times = {"experts": (2.0, 3.0), "unpermute": (0.1, 0.5)}
    for op, (ours, theirs) in times.items():
        file.write_text(json.dumps(run(record(op, "L", "triton", ours), record(op, "L", "torch", theirs))))
        assert prefer.main([str(file), "--table", str(table)]) == 0
    file.write_text(json.dumps(run(record("experts", "L", "triton", 4.0), record("experts", "L", "torch", 3.0))))
    assert prefer.main([str(file), "--table", str(table)]) == 0
    assert measured.load(table) == {
        **{("experts", "9.0", WIDE, compiled): "torch" for compiled in (False, True)},
        **{("unpermute", "9.0", "bfloat16, many tokens", compiled): "triton" for compiled in (False, True)},
    }
    assert capsys.readouterr().out.splitlines()[-2:] == [f"experts, {WIDE}: torch", f"experts, {WIDE}, compiled: torch"]
