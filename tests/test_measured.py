"""What "auto" takes where a measurement is known, and where none is."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from diffmoe_kernels import MoE, Routing, backend, measured, ops
from diffmoe_kernels.measured import attention_class, experts_class, fastest, load, movement_class, tokens_class
from diffmoe_kernels.triton_support import HAS_TRITON, INTERPRETED

ROW = {"op": "unpermute", "capability": "9.0", "shape_class": "bfloat16, few tokens", "compiled": False}
ROW |= {"fastest": "triton"}


def test_the_table_in_the_package():
    """Every row names an op, a backend, the file that its figures are from, and at least one other to compare with."""
    assert load() == measured.TABLE
    for row in json.loads(measured.FILE.read_text()):
        assert hasattr(ops, row["op"]) and row["fastest"] in backend.BACKENDS and row["source"]
        for case in row["cases"]:
            assert case["ms"].keys() >= {row["fastest"]} and len(case["ms"]) > 1, row


@pytest.mark.parametrize("text", ["{", "[1]", '[{"op": "experts"}]', "3"])
def test_a_broken_table_is_named(tmp_path, text):
    file = tmp_path / "measured.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="measured.json: expected a list of measured rows"):
        load(file)


def test_shape_classes():
    low = torch.bfloat16
    assert experts_class(32768, 16, 2048, low, True) == "bfloat16, many rows, wide, training"  # DSMoE-L-E16
    assert experts_class(2560, 48, 448, low, False) == "bfloat16, some rows, narrow, inference"  # L-E48 at T = 512
    assert experts_class(64, 48, 513, torch.float32, False) == "float32, few rows, wide, inference"
    prepared = attention_class(288, 64, True, True, low, False)
    assert prepared == "bfloat16, short, heads of 64, rotated, QK norm, inference"
    assert attention_class(1024, 72, False, False, low, True) == "bfloat16, long, heads of 72, no rotation, training"
    assert tokens_class(4096) == "few tokens" and tokens_class(4097) == "many tokens"


def test_fastest_asks_device_dtype_and_class(monkeypatch):
    monkeypatch.setattr(measured, "TABLE", load_rows(ROW))
    takes = fastest("unpermute", "triton", lambda x: movement_class(len(x), x.dtype))
    x = torch.zeros(8, 4, dtype=torch.bfloat16)
    assert not takes(x)  # on a CPU
    monkeypatch.setattr(measured, "capability_of", lambda device: "9.0")
    assert takes(x)
    assert not takes(x.float())
    assert not takes(torch.zeros(5000, 4, dtype=torch.bfloat16))
    assert not fastest("permute", "triton", lambda x: "bfloat16, few tokens")(x)
    assert not fastest("unpermute", "cuda", lambda x: "bfloat16, few tokens")(x)
    monkeypatch.setattr(measured, "capability_of", lambda device: "8.0")
    assert not takes(x)


def load_rows(*rows: dict) -> dict:
    return {tuple(row[key] for key in measured.KEYS): row["fastest"] for row in rows}


@pytest.fixture
def as_measured(monkeypatch):
    """As on a GPU where the kernels were measured fastest for training, PyTorch for inference."""
    rows = [
        {**ROW, "op": "experts", "shape_class": f"float32, few rows, narrow, {mode}", "compiled": compiled} | fastest
        for mode, fastest in (("training", {"fastest": "triton"}), ("inference", {"fastest": "torch"}))
        for compiled in (False, True)
    ]
    monkeypatch.setattr(measured, "TABLE", load_rows(*rows))
    monkeypatch.setattr(measured, "capability_of", lambda device: "9.0")
    module = pytest.importorskip("diffmoe_kernels.ops.experts._library")
    forward, backward = module.PRODUCTS["triton"]
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return forward(*args, **options)

    monkeypatch.setitem(module.PRODUCTS, "triton", (counted, backward))
    return calls


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="runs the kernels on a CPU")
def test_auto_follows_the_table(as_measured):
    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2), 3)
    x, up, down = torch.randn(2, 8), torch.randn(3, 16, 8, requires_grad=True), torch.randn(3, 8, 8)
    ops.experts(x, routing, up, down)
    assert len(as_measured) == 1
    with torch.no_grad():
        ops.experts(x, routing, up, down)
    ops.experts(x, routing, up, down, backend="torch")
    ops.experts(x.double(), routing, up.double(), down.double())  # not measured, and no kernel takes it
    assert len(as_measured) == 1


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="runs the kernels on a CPU")
def test_auto_compiles_to_one_graph(as_measured):
    layer = MoE(8, 8, 3, 2)
    x = torch.randn(4, 8)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-6)
    assert len(as_measured) == 2


def test_a_compiler_has_rows_of_its_own(monkeypatch):
    monkeypatch.setattr(measured, "TABLE", load_rows(ROW, {**ROW, "compiled": True, "fastest": "torch"}))
    monkeypatch.setattr(measured, "capability_of", lambda device: "9.0")
    takes = fastest("unpermute", "triton", lambda x: movement_class(len(x), x.dtype))

    def choose(x):
        return x + takes(x)

    x = torch.zeros(8, 4, dtype=torch.bfloat16)
    assert (choose(x) == 1).all()
    assert (torch.compile(choose, fullgraph=True, backend="aot_eager")(x) == 0).all()


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(("width", "triton"), [(128, False), (100, True), (2730, True)])
def test_sizes_that_grouped_mm_refuses_are_the_kernels(monkeypatch, width, triton):
    """On a GPU the reference, which waits for it, is no alternative."""
    names = ("experts", "grouped_gemm", "grouped_gemm._torch")
    experts, grouped_gemm, _torch = (importlib.import_module(f"diffmoe_kernels.ops.{name}") for name in names)
    for module in (measured, _torch):
        monkeypatch.setattr(module, "capability_of", lambda device: "9.0")
    x, up, down = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((8, 16), (2, 2 * width, 16), (2, 16, width)))
    routing = Routing.from_topk(torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1), 2)
    options = {"up_bias": None, "down_bias": None, "activation": "swiglu", "dropout": 0.0, "residual": None}
    assert experts._IMPLEMENTATIONS["triton"].automatic(x, routing, up, down, **options) == triton
    rows = torch.zeros(8, width, dtype=torch.bfloat16)
    assert grouped_gemm._IMPLEMENTATIONS["triton"].automatic(rows, down.mT, routing.group_offsets, None) == triton
