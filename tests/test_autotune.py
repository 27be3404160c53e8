"""The opt-in search for tiles: off by default, notes what it finds on disk, passes over what can't run."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from diffmoe_kernels.testing import assert_close
from diffmoe_kernels.triton_support import HAS_TRITON, INTERPRETED, Tile
from diffmoe_kernels.version import __version__

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
from triton.runtime.errors import OutOfResources

from diffmoe_kernels import autotune, ops
from diffmoe_kernels.ops.grouped_gemm import tiles
from diffmoe_kernels.ops.rope_attention import tiles as attention_tiles

DEFAULT, FAST, SLOW, BIG = (Tile(16 * n, 32, 32, 4, 2) for n in (1, 2, 4, 8))
MILLISECONDS = {DEFAULT: 2.0, FAST: 1.0, SLOW: 3.0}


@pytest.fixture
def searching(monkeypatch, tmp_path) -> list[Tile]:
    """The search is on, its clock is `MILLISECONDS`; the list gets the tiles that are timed."""
    monkeypatch.setenv("DIFFMOE_AUTOTUNE", "1")
    monkeypatch.setenv("DIFFMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_read", {})
    timed: list[Tile] = []

    def clock(run, **options) -> float:
        run()
        return MILLISECONDS[timed[-1]]

    monkeypatch.setattr(autotune.triton.testing, "do_bench", clock)
    return timed


def search(timed: list[Tile], shape_class: tuple = (64, torch.bfloat16)) -> Tile:
    def launch(tile: Tile) -> None:
        if tile == BIG:
            raise OutOfResources(300_000, 232_448, "shared memory")
        timed.append(tile)

    return autotune.best_tile("rows", shape_class, DEFAULT, [FAST, SLOW, BIG], launch)


def test_off_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFMOE_AUTOTUNE", raising=False)
    monkeypatch.setenv("DIFFMOE_CACHE_DIR", str(tmp_path))
    timed: list[Tile] = []
    sizes = 64, 2, 16, 16
    assert tiles.best_product_tile("rows", timed.append, sizes, torch.float32) == tiles.pick_tile(
        "rows", *sizes, torch.float32
    )
    expected = tiles.pick_weight_grad_tile(16, 16, torch.float32)
    assert tiles.best_weight_grad_tile(timed.append, sizes, torch.float32) == expected
    assert not timed and not list(tmp_path.iterdir())


def test_takes_the_fastest_that_runs_and_notes_it(searching, monkeypatch, tmp_path):
    assert search(searching) == FAST
    assert set(searching) == {DEFAULT, FAST, SLOW}
    searching.clear()
    assert search(searching) == FAST and not searching  # known by now
    monkeypatch.setattr(autotune, "_read", {})  # as in the next process
    assert search(searching) == FAST and not searching
    assert search(searching, (128, torch.bfloat16)) == FAST and searching  # another shape class
    keys = list(json.loads((tmp_path / "tiles.json").read_text()))
    assert len(keys) == 2 and all("rows" in key and f"diffmoe_kernels {__version__}, triton 3." in key for key in keys)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["tiles.json", "tiles.lock"]


def test_processes_add_to_each_others_file(searching, monkeypatch, tmp_path):
    search(searching, (1,))
    mine = dict(autotune._read)
    monkeypatch.setattr(autotune, "_read", {tmp_path / "tiles.json": {}})  # another, that read before
    search(searching, (2,))
    monkeypatch.setattr(autotune, "_read", mine)
    search(searching, (3,))
    assert len(json.loads((tmp_path / "tiles.json").read_text())) == 3


@pytest.mark.parametrize("text", ["{", '{"%s": {"rows": 3}}', "[1]", '{"key": 1}'])
def test_a_broken_file_is_named(searching, monkeypatch, tmp_path, text):
    search(searching)
    (key,) = json.loads((tmp_path / "tiles.json").read_text())
    monkeypatch.setattr(autotune, "_read", {})
    (tmp_path / "tiles.json").write_text(text.replace("%s", key))
    with pytest.raises(ValueError, match=r"tiles\.json: expected the tiles of an earlier search.*delete the file"):
        search(searching)


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("DIFFMOE_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="DIFFMOE_AUTOTUNE: expected 0 or 1, got 'yes'"):
        autotune.is_on()


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFMOE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / "diffmoe-kernels" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert autotune.cache_file() == tmp_path / ".cache" / "diffmoe-kernels" / "tiles.json"


@pytest.mark.skipif(not INTERPRETED, reason="the clock is the interpreter's")
def test_every_product_searches(searching, monkeypatch, tmp_path):
    """Forward and backward of `experts` ask for four kernels' tiles, and are right with what is found."""
    monkeypatch.setattr(tiles, "candidates", lambda *_, **__: iter([Tile(16, 16, 16, 4, 2)]))
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, **_: [run()] and 1.0)
    from diffmoe_kernels import Routing

    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 2], [0, 2]]), torch.rand(3, 2), 4)
    inputs = [torch.randn(3, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 8)]
    results = []
    for backend in ("triton", "reference"):
        x, up, down = (one.clone().requires_grad_() for one in inputs)
        y = ops.experts(x, routing, up, down, backend=backend)
        results.append([y, *torch.autograd.grad(y.sum(), [x, up, down])])
    for one, expected in zip(*results, strict=True):
        assert_close(one, expected)
    keys = json.loads((tmp_path / "tiles.json").read_text())
    assert {key.split(" | ")[2] for key in keys} == {"up", "rows", "down_backward", "weight_grad"}


@pytest.mark.skipif(not INTERPRETED, reason="the clock is the interpreter's")
def test_attention_searches(searching, monkeypatch, tmp_path):
    """All three kernels, by what they are compiled for, and it is right with what is found: the last that is tried."""
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, **_: [run()] and next(times))
    monkeypatch.setattr(attention_tiles, "_TRIED", ((32, 64, 4), (64, 32, 8)))
    inputs = torch.randn(2, 64, 5, 32)  # 3 query heads
    for num_tokens in (40, 30, 64):  # the first two are of a class, the third is a whole block
        results = []
        for backend in ("triton", "reference"):
            qkv = inputs[:, :num_tokens].bfloat16().requires_grad_()
            y = ops.rope_attention(qkv, num_kv_heads=1, backend=backend)
            results.append([y, *torch.autograd.grad(y.sum(), qkv)])
        for one, expected in zip(*results, strict=True):
            assert_close(one, expected)
    found = json.loads((tmp_path / "tiles.json").read_text())
    kernels = [key.split(" | ")[2] for key in found]
    assert Counter(kernels) == {f"attention_{one}": 2 for one in ("forward", "query_backward", "key_backward")}
    for kernel, tile in zip(kernels, found.values(), strict=True):
        shape = (32, 64) if kernel == "attention_key_backward" else (64, 32)
        assert (tile["m"], tile["n"], tile["warps"], tile["registers"]) == (*shape, 8, 128)


@pytest.mark.parametrize("generation", [80, 90, 100])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "tf32")])
def test_candidates_hold_the_defaults(monkeypatch, generation, paired, dtype, precision):
    """The search can come back with the hand-picked tiles of training, and tries both kinds of loads where it can."""
    monkeypatch.setattr(tiles, "chip_generation", lambda: generation)
    monkeypatch.setattr(tiles, "input_precision", lambda _: precision)
    tried = list(tiles.candidates(dtype, paired=paired))
    assert len(tried) == len(set(tried)) and 10 < len(tried) < 80
    assert {tile.descriptors for tile in tried} == ({False, True} if generation >= 90 else {False})
    for columns, depth in ((1024, 1024), (448, 1024), (384, 768), (384, 128), (128, 384)):
        kernel = "up" if paired else "rows"
        assert tiles.pick_tile(kernel, 65536, 16, columns, depth, dtype, paired=paired) in tried


def test_candidates_without_tensor_cores():
    assert len(list(tiles.candidates(torch.float32))) >= 3


def test_a_capture_takes_what_is_known_and_searches_nothing(searching, monkeypatch):
    search(searching, (1,))
    searching.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert search(searching, (1,)) == FAST
    assert search(searching, (2,)) == DEFAULT and not searching


def test_the_first_entry_of_a_file_holds(searching, monkeypatch, tmp_path):
    """Another process searched at the same time and was done first."""
    autotune.best_tile("rows", (1,), SLOW, [], lambda tile: searching.append(tile))
    loads = iter([{}, autotune._load(tmp_path / "tiles.json")])
    monkeypatch.setattr(autotune, "_load", lambda file: next(loads))
    monkeypatch.setattr(autotune, "_read", {})
    assert search(searching, (1,)) == SLOW


def test_processes_that_search_at_once_agree(searching, monkeypatch):
    """As the ranks of a training do: each finds a tile of its own fastest, all take that of the first to be done."""
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, **_: 1.0)
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(3), context.SimpleQueue()

    def rank(number: int) -> None:
        together.wait()
        mine = Tile(16, 16, 16 * number, 4, 2)
        results.put([autotune.best_tile("rows", (n % 20,), mine, [], lambda tile: None) for n in range(40)])

    ranks = [context.Process(target=rank, args=(number,)) for number in (1, 2, 4)]
    for one in ranks:
        one.start()
    took = [results.get() for _ in ranks]
    for one in ranks:
        one.join()
    assert took[0] == took[1] == took[2]
    assert took[0][:20] == took[0][20:]  # and keep it


def test_tiles_that_the_compiler_fails_on_are_passed_over(searching):
    def launch(tile: Tile) -> None:
        if tile != SLOW:
            raise RuntimeError("PassManager::run failed")
        searching.append(tile)

    assert autotune.best_tile("rows", (1,), DEFAULT, [FAST, SLOW, BIG], launch) == SLOW

    def never(tile: Tile) -> None:
        raise RuntimeError("PassManager::run failed")

    with pytest.raises(RuntimeError, match="PassManager"):
        autotune.best_tile("rows", (2,), DEFAULT, [FAST], never)


def test_candidates_compile_at_once(searching, monkeypatch):
    """The default by itself in the caller's thread, then as many as there are cores, on the caller's stream."""
    monkeypatch.setattr(autotune, "INTERPRETED", False)
    monkeypatch.setattr(autotune, "device_name", lambda: "a GPU")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
    streams: dict[int, str] = {}

    @contextmanager
    def on_stream(stream):
        streams[threading.get_ident()] = stream
        yield

    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    together = threading.Barrier(3, timeout=60)  # breaks unless all three launches of candidates are under way
    compiled: dict[Tile, int] = {}

    def launch(tile: Tile) -> None:
        if tile not in compiled:
            assert streams[threading.get_ident()] == "the caller's" and not torch.is_grad_enabled()
            compiled[tile] = threading.get_ident()
            if tile != DEFAULT:
                together.wait()
            if tile == BIG:
                raise OutOfResources(300_000, 232_448, "shared memory")
        searching.append(tile)

    assert autotune.best_tile("rows", (1,), DEFAULT, [FAST, SLOW, BIG], launch) == FAST
    assert next(iter(compiled)) == DEFAULT and compiled[DEFAULT] == threading.get_ident()
    assert len(set(compiled.values())) == 4


def test_a_folder_that_can_not_be_written_costs_a_warning(searching, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFMOE_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="not kept: .*set DIFFMOE_CACHE_DIR"):
        assert search(searching) == FAST
    searching.clear()
    assert search(searching) == FAST and not searching


def test_others_may_read_the_file(searching, tmp_path):
    (tmp_path / "other").write_text("")
    search(searching)
    assert (tmp_path / "tiles.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_float32_products_of_either_precision_are_searched_apart(searching, monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "candidates", lambda *_, **__: iter([]))
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, **_: 1.0)
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(tiles, "input_precision", lambda dtype, precision=precision: precision)
        tiles.best_product_tile("rows", lambda tile: None, (64, 2, 16, 16), torch.float32)
    assert len(json.loads((tmp_path / "tiles.json").read_text())) == 2
