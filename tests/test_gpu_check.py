"""`make gpu-check`: its processes, the benchmarks' parts, and their files as one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest

from benchmarks import check, conftest, files, goals, prefer, whole_models
from benchmarks.cases import all_cases, pairs
from benchmarks.files import CAPTURE_FAILED
from benchmarks.parts import ALONE, PARTS
from benchmarks.registry import GPU
from tests.sanitizer import sanitized


def test_every_pair_is_in_one_part_and_the_goals_come_first() -> None:
    found = pairs(GPU)
    keys = [(*case.key, provider) for _, case, provider in found]
    assert len(set(keys)) == len(keys) == sum(len(case.providers) for case in all_cases(GPU))
    parts = [part for part, _, _ in found]
    assert set(parts) == set(PARTS) and parts == sorted(parts, key=PARTS.index)
    decisive = {key for goal in goals.GOALS for key in goal.decisive} & set(keys)
    shown = {key for goal in goals.GOALS for key in goal.shown} & set(keys)
    for whole in (False, True):
        own = [key for key in keys if (key[0] in whole_models.BATCHES) == whole]
        assert set(own[: len(decisive.intersection(own))]) == decisive.intersection(own)
        assert set(own[: len(shown.intersection(own))]) == shown.intersection(own) > decisive.intersection(own)
        assert {part in ALONE for part, case, _ in found if (case.op in whole_models.BATCHES) == whole} == {whole}
    assert keys[0] == ("experts", "DSMoE-L-E16", "forward+backward", "triton")
    first = [(case.name, provider) for part, case, provider in found if part == "models"]
    assert first[:4] == [
        *(("DSMoE-L-E16, batch 64", "triton, compiled"), ("DiT-L/2, batch 64", "torch, compiled")),
        *(("DSMoE-L-E16, batch 256", "triton, compiled"), ("DiT-L/2, batch 256", "torch, compiled")),
    ]


def test_a_part_is_collected_alone() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--collect-only", "--part=attention"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=check.ROOT, check=True).stdout
    collected = [line for line in told.splitlines() if "::" in line]
    assert len(collected) == sum(part == "attention" for part, _, _ in pairs(GPU))
    assert all("rope_attention" in line and "triton" in line for line in collected)


def part(name: str, **run: object) -> dict:
    facts = {"op": "experts", "name": name, "direction": "forward+backward", "T": 16384, "E": 16, "K": 2, "I": 2048}
    facts |= {"dtype": "bfloat16", "weights_dtype": "bfloat16", "compiled": False, "published_size": True}
    facts |= {"ceiling": False, "flops": 10**12, "least_bytes": 10**9, "p20_ms": 1.9, "p80_ms": 2.2}
    machine = {"device": "NVIDIA H200", "compute_capability": "9.0", "torch": "2.11.0", "commit": "abc"}
    return {
        "datetime": "2026-11-21",
        "run": {**machine, "ceilings": {"copy_bytes_per_second": 4e12, "product_flops_per_second": 7e14}, **run},
        "not_run": [{"test": f"of {name}", "outcome": "skipped", "reason": "why not"}],
        "benchmarks": [
            {"extra_info": {**facts, "provider": one, "backend": one, "saved_mib": 1.0}, "stats": {"median": 2e-3}}
            for one in ("triton", "torch")
        ],
    }


def saved(folder, **parts: dict) -> list:
    for name, one in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    return [folder / f"{name}.json" for name in parts]


def test_files_as_one(tmp_path, capsys) -> None:
    higher = {"copy_bytes_per_second": 4.2e12, "product_flops_per_second": 6e14}
    again = part("DSMoE-L-E16")
    again["benchmarks"][0]["stats"]["median"] = 1e-3
    paths = saved(tmp_path, one=part("DSMoE-L-E16"), two=part("DSMoE-L-E48", ceilings=higher), three=again)
    data = files.load(paths)
    assert data["run"]["ceilings"] == {"copy_bytes_per_second": 4.2e12, "product_flops_per_second": 7e14}
    assert len(data["benchmarks"]) == 6 and len(data["not_run"]) == 2
    assert "4 measured, 2 skipped, 0 failed" in goals.report(data)
    assert goals.main([str(path) for path in paths]) == 0
    assert "1.000 ms (triton)" in capsys.readouterr().out
    table = tmp_path / "table.json"
    assert prefer.main([*map(str, paths), "--table", str(table)]) == 0
    found = json.loads(table.read_text())
    assert [row["compiled"] for row in found] == [False, True]
    for row in found:
        assert row["source"] == "one.json, two.json, three.json" and row["fastest"] == "triton"
        assert [case["name"].split(",")[0] for case in row["cases"]] == ["DSMoE-L-E16", "DSMoE-L-E48"]
    assert files.load(paths[:1]) == part("DSMoE-L-E16")
    paths = saved(tmp_path, one=part("DSMoE-L-E16", command="a"), two=part("DSMoE-L-E48", command="b"))
    assert files.load(paths)["run"]["command"] == "a; b"
    nothing = {key: value for key, value in part("DSMoE-L-E16").items() if key != "datetime"} | {"benchmarks": []}
    assert files.load(saved(tmp_path, one=nothing, two=part("DSMoE-L-E48")))["datetime"] == part("x")["datetime"]
    later = part("DSMoE-L-E48") | {"datetime": "2026-11-22"}
    assert files.load(saved(tmp_path, one=part("DSMoE-L-E16"), two=later))["datetime"] == part("x")["datetime"]


def test_an_interrupted_benchmark_is_told_by_its_last_frame() -> None:
    """Else pytest reads the sources of all of torch.compile before the results are written."""

    def compiles() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as told:
        compiles()
    assert len(told.traceback) > 1
    conftest.pytest_keyboard_interrupt(told)
    assert len(told.traceback) == 1 and told.getrepr()


def test_what_another_file_timed_was_run(tmp_path) -> None:
    first, second = part("DSMoE-L-E16"), part("DSMoE-L-E16")
    missed = first["benchmarks"].pop()["extra_info"]
    first["not_run"].append({**missed, "test": "t", "outcome": "skipped", "reason": "the budget was spent"})
    paths = saved(tmp_path, one=first, two=second)
    assert "the budget was spent" in str(files.load(paths[:1])["not_run"])
    assert "the budget was spent" not in str(files.load(paths)["not_run"])
    second["benchmarks"].pop()
    second["not_run"].append({**missed, "test": "t", "outcome": "failed", "reason": "wrong by 1"})
    later = [one["reason"] for one in files.load(saved(tmp_path, one=first, two=second))["not_run"]]
    assert sorted(later) == ["why not", "wrong by 1"]


@pytest.mark.parametrize(("key", "other"), [("device", "NVIDIA A100"), ("torch", "2.12.0"), ("commit", "def")])
def test_files_of_two_runs_are_refused(key, other, tmp_path, capsys) -> None:
    paths = saved(tmp_path, one=part("DSMoE-L-E16"), two=part("DSMoE-L-E48", **{key: other}))
    for main in (goals.main, prefer.main):
        assert main([*map(str, paths)]) == 2
        told = capsys.readouterr().err
        assert "two.json" in told and key in told and other in told and "one.json" in told


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_what_is_no_file_of_results(content, tmp_path) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=r"file\.json: expected"):
        files.load([tmp_path / "file.json"])


def test_a_process_is_given_its_time() -> None:
    assert check.run([sys.executable, "-c", "print('done')"], 60) == (0, "done")
    assert check.run([sys.executable, "-c", "import os; print(os.environ['THREADS'])"], 60, THREADS="1") == (0, "1")
    status, told = check.run([sys.executable, "-c", "import sys; print('no'); sys.exit(3)"], 60)
    assert (status, told) == (3, "no")
    stubborn = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True)); "
    stubborn += "print('begun', flush=True)\nfor _ in range(600): time.sleep(0.1)"
    start = time.monotonic()
    status, told = check.run([sys.executable, "-c", stubborn], 2, grace=1)
    assert status < 0 and told == "begun\nasked\nstopped after 2 s" and time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("tool", "says", "faults"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", 0),
        ("memcheck", "ERROR SUMMARY: 1 error", 1),
        ("racecheck", "RACECHECK SUMMARY: 12 hazards displayed (12 errors, 0 warnings)", 12),
    ],
)
def test_what_the_sanitizer_found_is_read(tool, says, faults, tmp_path, monkeypatch) -> None:
    """Its exit status may be the script's."""
    stand_in(tmp_path, monkeypatch, f'echo "$@"; echo "========= {says}"; exit 1')
    output, found = sanitized(tool, "print('script')", "word", kernels="diffmoe")
    assert found == faults and f"--tool={tool}" in output and "kernel_substring=diffmoe" in output
    assert output.splitlines()[0].endswith("-c print('script') word")


@pytest.mark.parametrize(("does", "message"), [("sleep 300", "took more than 5 s: begun"), ("exit 0", "no summary")])
def test_a_sanitizer_without_a_result_is_a_failure(does, message, tmp_path, monkeypatch) -> None:
    """What it started, such as the script, ends with it."""
    stand_in(tmp_path, monkeypatch, f"echo begun; {does}")
    start = time.monotonic()
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        sanitized("memcheck", "", kernels="diffmoe", seconds=5)
    assert time.monotonic() - start < 120


def test_a_sanitizer_ends_with_an_interrupted_test(tmp_path, monkeypatch) -> None:
    stand_in(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; sleep 300")

    def interrupted(process: subprocess.Popen, **_: object) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sanitized("memcheck", "", kernels="diffmoe")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_time_stopped_is_told_apart_from_failures(tmp_path, monkeypatch, capsys) -> None:
    told = {"late.py": (2, "1 passed\nstopped after 5 s"), "bad.py": (1, "1 failed"), "good.py": (0, "1 passed")}
    monkeypatch.setattr(check, "build", lambda: (0, "built"))
    monkeypatch.setattr(check, "run", lambda command, *_, **__: next(told[one] for one in told if one in command))
    assert check.check(tmp_path / "gpu.json", 100.0, list(told), []) == 1
    failed = capsys.readouterr().out.splitlines()[-1].partition("failed: ")[2].split(", ")
    assert sorted(failed) == ["bad.py", "goals", "late.py (stopped by time)"]


def test_parts_of_a_later_run(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(check, "check", lambda *arguments: asked.append(arguments) or 0)
    check.main(["more.json", "--no-tests", "--parts", "extras", "models"])
    assert asked == [(Path("more.json"), 500, [], ["models", "extras"])]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """A compute-sanitizer first on the PATH."""
    (folder / "compute-sanitizer").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_every_part_has_a_process_and_a_failure_stops_nothing(tmp_path, monkeypatch, capsys) -> None:
    commands, threads = [], {}

    def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        commands.append(words := " ".join(command))
        if "--benchmark-json=" in words:
            threads[words.split("--part=")[1].split()[0]] = environment.get(check.COMPILE_THREADS)
        written = [word.partition("=")[2] for word in command if word.startswith("--benchmark-json=")]
        if written and "--part=layers" not in words:
            name = "DSMoE-L-E48" if "--part=attention" in words else "DSMoE-L-E16"
            Path(written[0]).write_text(json.dumps(part(name)))
        return int("--part=layers" in words or "bad" in words), "told"

    monkeypatch.setattr(check, "build", lambda: (0, "built"))
    monkeypatch.setattr(check, "run", run)
    results = tmp_path / "new" / "gpu.json"
    assert check.check(results, 100.0, ["tests/good.py", "tests/bad.py"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("failed: tests/bad.py, layers") and "| experts DSMoE-L-E48" in out
    assert len(json.loads(results.read_text())["benchmarks"]) == 2 * (len(PARTS) - 1)
    timed = [words for words in commands if "--benchmark-json=" in words]
    assert [words.split("--part=")[1].split()[0] for words in timed] == list(PARTS)
    assert sum("-m gpu" in words for words in commands) == 2
    warmed = [words.split("--part=")[1].split()[0] for words in commands if "--benchmark-disable" in words]
    assert sorted(warmed) == sorted(set(PARTS) - set(ALONE))  # a whole model leaves the tests no memory
    assert {name for name, number in threads.items() if number != "1"} == set(ALONE)  # what was not compiled before
    budgets = {words.split("--part=")[1].split()[0]: words.split("--budget=")[1].split()[0] for words in timed}
    assert float(budgets["models"]) < float(budgets["extras"]) - 40


def test_results_are_named_after_the_gpu_and_the_day(monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(check, "check", lambda results, *_: asked.append(results) or 0)
    monkeypatch.setattr(check, "run", lambda command, seconds: (0, "a warning\nNVIDIA H200 (NVL)"))
    assert check.main([]) == check.main(["here.json"]) == 0
    folder = check.ROOT / "benchmarks" / "results"
    assert asked == [folder / f"nvidia-h200-nvl-{date.today()}.json", Path("here.json")]
    monkeypatch.setattr(check, "run", lambda command, seconds: (1, "RuntimeError: no NVIDIA driver"))
    assert check.main([]) == 2 and "no NVIDIA driver" in capsys.readouterr().err and len(asked) == 2


def test_what_a_failed_capture_kept_from_running_runs_in_another_process(tmp_path, monkeypatch, capsys) -> None:
    commands = []

    def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        if not (written := [word.partition("=")[2] for word in command if word.startswith("--benchmark-json=")]):
            return 0, "told"
        commands.append(command)
        found = part("DSMoE-L-E48" if len(commands) == 3 else "DSMoE-L-E16")
        if len(commands) < 3:
            kept = {"test": f"test[{len(commands)}]", "outcome": "skipped", "reason": CAPTURE_FAILED}
            facts = {**part("DSMoE-L-E48")["benchmarks"][0]["extra_info"]}
            found["not_run"] = [facts | kept]
        Path(written[0]).write_text(json.dumps(found))
        return 0, "told"

    monkeypatch.setattr(check, "build", lambda: (0, "built"))
    monkeypatch.setattr(check, "run", run)
    results = tmp_path / "gpu.json"
    assert check.check(results, 100.0, [], ["experts"]) == 0
    assert len(commands) == 3
    for before, after in itertools.pairwise(commands):
        (file,) = (word.partition("=")[2] for word in before if word.startswith("--benchmark-json="))
        assert f"--rest-of={file}" in after
    assert not any(word.startswith("--rest-of") for word in commands[0])


def test_the_rest_of_a_run_is_collected_alone(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--collect-only", "--part=experts"]
    first, second = (
        f"benchmarks/test_speed.py::test_speed[{', '.join(case.key)}, {provider}]"
        for _, case, provider in pairs(GPU)[:2]
    )
    data = part("DSMoE-L-E48")
    data["not_run"] = [
        {"test": first, "outcome": "skipped", "reason": CAPTURE_FAILED},
        {"test": second, "outcome": "failed", "reason": "wrong"},
    ]
    (file,) = saved(tmp_path, one=data)
    rest = subprocess.run([*command, f"--rest-of={file}"], capture_output=True, text=True, cwd=check.ROOT, check=True)
    assert [line for line in rest.stdout.splitlines() if "::" in line] == [first]


def test_a_failed_capture_ends_the_times_of_its_process(tmp_path) -> None:
    """What it kept from running is in the file as `--rest-of` reads it."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "broken.py").write_text("from benchmarks import timing\ntiming.BROKEN.append(None)\n")
    file = tmp_path / "results.json"
    options = ["-k", "token_drop and reference and not predicted and not sampling", f"--benchmark-json={file}"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", *options]
    path = os.pathsep.join([str(tmp_path), str(check.ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_PLUGINS": "broken"}
    told = subprocess.run(command, capture_output=True, text=True, cwd=check.ROOT, env=environment, check=True).stdout
    assert CAPTURE_FAILED in told and " passed" not in told
    (one,) = files.kept_from_running(files.load([file]))
    assert one.startswith("benchmarks/test_speed.py::test_speed[token_drop, DiffMoE-L-E8")


def test_a_spent_budget_starts_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "build", lambda: (0, "built"))
    monkeypatch.setattr(check, "run", lambda command, seconds, **_: (0, "told") if seconds > 0 else (1, "late"))
    assert check.check(tmp_path / "gpu.json", 0.0, []) == 1
    assert capsys.readouterr().out.count("not begun: the budget of 0 s is spent") == len(PARTS)
    assert not (tmp_path / "gpu.json").exists()


def test_files_with_tests_for_a_gpu_are_found(tmp_path) -> None:
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    marked = "@pytest.mark." + "gpu\ndef test(): ..."
    names = ("tests/test_b.py", "tests/ops/test_a.py", "tests/test_gpu_parity.py")
    for name, text in (*((name, marked) for name in names), ("tests/test_c.py", "")):
        (tmp_path / name).write_text(text)
    assert check.gpu_tests(tmp_path) == ["tests/test_gpu_parity.py", "tests/ops/test_a.py", "tests/test_b.py"]
    assert {"tests/test_gpu.py", "tests/models/test_latents.py"} <= set(check.gpu_tests())
