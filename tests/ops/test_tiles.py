"""The grouped products with other tiles than the default: descriptors, several tiles a program, edges of all kinds."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from diffmoe_kernels import triton_support
from diffmoe_kernels.testing import assert_close, poisoned_allocations
from diffmoe_kernels.triton_support import HAS_TRITON, INTERPRETED, Tile

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
from diffmoe_kernels.ops.experts._triton import up_projection
from diffmoe_kernels.ops.experts._triton_backward import down_backward
from diffmoe_kernels.ops.experts.reference import activate
from diffmoe_kernels.ops.grouped_gemm import tiles
from diffmoe_kernels.ops.grouped_gemm._triton import multiply_rows
from diffmoe_kernels.ops.grouped_gemm._triton_sum_rows import sum_rows
from diffmoe_kernels.ops.grouped_gemm._triton_weight_grad import weight_grad

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TF32 = torch.float32, "tf32"  # dtype and precision of a product
# Depth and columns fill no tile; groups of 0, 1, 37 and 20 rows, 12 rows past the last.
HIDDEN, INNER, SIZES, ROWS, TOKENS = 40, 72, (0, 1, 37, 0, 20), 70, 29
TILES = [
    Tile(32, 32, 32, 4, 2),
    Tile(32, 32, 32, 4, 2, descriptors=True),
    Tile(16, 64, 16, 4, 3, group_m=1, descriptors=True),
]
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def offsets() -> Tensor:
    return torch.tensor(SIZES, dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


def by_group(rows: Tensor, matrices: Tensor) -> Tensor:
    """(R, K), (E, K, N) -> (valid R, N) in float64."""
    groups = rows[: sum(SIZES)].double().split(SIZES)
    return torch.cat([one @ matrix.double() for one, matrix in zip(groups, matrices, strict=True)])


def check(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual[: len(expected)], expected.to(actual.dtype))


@each_tile
@each_dtype
@pytest.mark.parametrize("k_inner", [False, True])
def test_rows(k_inner, dtype, tile):
    x = randn(ROWS, HIDDEN, dtype=dtype)
    x[sum(SIZES) :] = torch.nan  # past the last group nothing may reach a result
    w = randn(len(SIZES), INNER, HIDDEN, dtype=dtype).mT if k_inner else randn(len(SIZES), HIDDEN, INNER, dtype=dtype)
    bias = randn(len(SIZES), INNER, dtype=dtype)
    with poisoned_allocations():
        y, whole = (multiply_rows(x, w, offsets(), bias=bias, clears_rest=one, tile=tile) for one in (False, True))
    check(y, by_group(x, w) + bias.double().repeat_interleave(torch.tensor(SIZES, device=DEVICE), 0))
    assert torch.equal(whole[: sum(SIZES)], y[: sum(SIZES)])
    assert y[sum(SIZES) :].isnan().all() and (whole[sum(SIZES) :] == 0).all()


def test_where_no_group_has_a_row_all_is_cleared():
    x, w = randn(ROWS, HIDDEN), randn(1, HIDDEN, INNER)
    with poisoned_allocations():
        y = multiply_rows(x, w, torch.zeros(1, dtype=torch.int32, device=DEVICE), clears_rest=True)
    assert (y == 0).all()


@each_tile
@each_dtype
@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
def test_up_projection_and_down_backward(activation, dtype, tile):
    tokens = torch.randint(TOKENS, (ROWS,), dtype=torch.int32).to(DEVICE)
    gates, group_offsets = torch.rand(ROWS).to(DEVICE), offsets()
    width = 2 * INNER if activation == "swiglu" else INNER
    x, up, down = (
        randn(TOKENS, HIDDEN, dtype=dtype),
        randn(len(SIZES), width, HIDDEN, dtype=dtype),
        randn(len(SIZES), HIDDEN, INNER, dtype=dtype),
    )
    with poisoned_allocations():
        pre, hidden = up_projection(x, tokens, group_offsets, up, None, activation, keep_pre=True, tile=tile)
    expected = by_group(x[tokens.long()], up.mT)
    check(pre, expected)
    check(hidden, activate(pre[: len(expected)].double(), activation))

    grad = randn(TOKENS, HIDDEN, dtype=dtype)
    with poisoned_allocations():
        back = down_backward(grad, tokens, gates, group_offsets, down, None, pre, activation, tile=tile)
    grad_pre, weighted, grad_gates = back
    kept = pre[: len(expected)].double().requires_grad_()
    act = activate(kept, activation)
    gate = gates[: len(expected)].double()
    by_act = by_group(grad[tokens.long()], down)
    check(grad_pre, torch.autograd.grad(act, kept, by_act * gate[:, None])[0])
    check(weighted, act.detach() * gate[:, None])
    check(grad_gates, (by_act * act.detach()).sum(1))
    assert (grad_gates[len(expected) :] == 0).all()


@each_tile
@each_dtype
def test_weight_grad(dtype, tile):
    tokens = torch.randint(TOKENS, (ROWS,), dtype=torch.int32).to(DEVICE)
    a, b = randn(ROWS, INNER, dtype=dtype), randn(TOKENS, HIDDEN, dtype=dtype)
    a[sum(SIZES) :] = torch.nan
    with poisoned_allocations():
        grad = weight_grad(a, b, offsets(), token_indices=tokens, gather="b", dtype=torch.float32, tile=tile)
    groups = [one.double().split(SIZES) for one in (a[: sum(SIZES)], b[tokens.long()][: sum(SIZES)])]
    assert_close(grad, torch.stack([one.T @ other for one, other in zip(*groups, strict=True)]).float(), tolerance=1e-5)


@pytest.mark.parametrize("num_shares", [1, 2, 5, 64])
@pytest.mark.parametrize("sizes", [SIZES, (0, 3, 150, 2), (0, 0)], ids=str)
def test_weight_grad_by_programs_that_share(sizes, num_shares):
    """Evenly, whatever the groups are: more programs than steps, a tile of many, programs of many tiles, no rows."""
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
    num_rows = sum(sizes) + 3
    tokens = torch.randint(TOKENS, (num_rows,), dtype=torch.int32).to(DEVICE)
    a, b = randn(TOKENS, INNER, dtype=torch.bfloat16), randn(num_rows, HIDDEN, dtype=torch.bfloat16)
    b[sum(sizes) :] = torch.nan
    how = {"token_indices": tokens, "gather": "a", "dtype": torch.float32, "tile": TILES[2]}
    with poisoned_allocations():
        grad, again = (weight_grad(a, b, ends, **how, num_shares=num_shares) for _ in range(2))
    groups = [one.double()[: sum(sizes)].split(sizes) for one in (a[tokens.long()], b)]
    expected = torch.stack([one.T @ other for one, other in zip(*groups, strict=True)])
    assert_close(grad, expected.float(), tolerance=1e-5)
    assert torch.equal(grad, again)


def test_where_programs_share(monkeypatch):
    """On 132 multiprocessors: where the last tiles would keep few of them busy, long enough to pay for the parts."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)

    def shares(num_tiles, rows_a_group, warps=8, generation=90, columns=256):
        monkeypatch.setattr(tiles, "chip_generation", lambda: generation)
        return tiles.weight_grad_shares(num_tiles, rows_a_group, Tile(128, columns, 64, warps, 3), torch.empty(0))

    assert shares(144, 8192) == 132 and shares(144, 8192, warps=4) == 264
    assert shares(144, 640) == 0 and shares(144, 6400) == 132 and shares(8, 640) == 0 and shares(8, 6400) == 132
    assert shares(1344, 1706) == 0  # DSMoE-L-E48, for less than a hundredth
    assert shares(528, 8192) == 0 and shares(2048, 2048) == 0 and shares(144, 8192, columns=64) == 0
    assert shares(144, 8192, generation=80) == 0 and shares(144, 8192, generation=100) == 0


@each_dtype
@pytest.mark.parametrize("gathers", [True, False])
def test_sum_rows(dtype, gathers):
    """Of columns that fill no tile and rows with gaps, over groups of none, of one and of more rows than a tile."""
    sizes = [0, 1, 300, 0]
    ends, num_rows = torch.tensor(sizes).cumsum(0).to(DEVICE, torch.int32), 320
    tokens, gates = torch.randint(TOKENS, (num_rows,), dtype=torch.int32).to(DEVICE), randn(num_rows)
    rows = randn(TOKENS if gathers else num_rows, 200, dtype=dtype)[:, :99]
    if not gathers:
        rows[sum(sizes) :] = torch.nan
    with poisoned_allocations():
        total = sum_rows(
            rows, ends, token_indices=tokens if gathers else None, gates=gates if gathers else None, dtype=torch.float32
        )
    read = rows[tokens.long()].double() * gates.double()[:, None] if gathers else rows.double()
    expected = [one.sum(0) for one in read[: sum(sizes)].split(sizes)]
    assert_close(total, torch.stack(expected).float(), tolerance=1e-5)


@each_dtype
def test_one_program_takes_every_tile(monkeypatch, dtype):
    """As on a device with fewer multiprocessors than tiles: the same bits."""
    x, w, group_offsets = randn(ROWS, HIDDEN, dtype=dtype), randn(len(SIZES), HIDDEN, INNER, dtype=dtype), offsets()
    several = multiply_rows(x, w, group_offsets, clears_rest=True, tile=TILES[1])
    monkeypatch.setattr(sys.modules[multiply_rows.__module__], "num_programs", lambda tiles, like: 1)
    assert torch.equal(multiply_rows(x, w, group_offsets, clears_rest=True, tile=TILES[1]), several)


def test_programs_are_bounded():
    assert triton_support.num_programs(3, torch.empty(0)) == 3
    assert triton_support.num_programs(10**9, torch.empty(0, device=DEVICE)) <= 8 * 1024


@pytest.mark.parametrize(
    "tensor, block",
    [
        (torch.empty(8, 12, dtype=torch.bfloat16), (8, 8)),  # rows of 24 bytes
        (torch.empty(8, 16).T, (8, 8)),  # columns inner
        (torch.empty(8, 1).expand(8, 16)[:, :4], (8, 4)),  # a stride of 0
        (torch.empty(129)[1:].view(8, 16), (8, 8)),  # begins at 4 bytes
        (torch.empty(8, 1024), (8, 512)),  # a tile beyond what the copy engine takes
        (torch.empty(8, 1024)[:, :0], (8, 8)),  # nothing to describe
    ],
)
def test_layouts_without_descriptors(tensor, block):
    assert triton_support.describe((torch.empty(8, 16), (8, 8)), (tensor, block)) is None


def test_odd_layouts_take_pointer_loads():
    """Rows that begin at odd addresses have no descriptors, and the result is right all the same."""
    x, w = randn(ROWS, 37, dtype=torch.bfloat16), randn(len(SIZES), 37, 51, dtype=torch.bfloat16)
    check(multiply_rows(x, w, offsets(), tile=TILES[1]), by_group(x, w))


@pytest.mark.parametrize("generation", [80, 90, 100])
@pytest.mark.parametrize("rows_a_group", [1, 64, 4096])
def test_default_tiles(monkeypatch, generation, rows_a_group):
    """Descriptors from sm_90 on, tensor-core shapes, and a tile that is not twice as wide as the columns."""
    monkeypatch.setattr(tiles, "chip_generation", lambda: generation)
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), TF32):
        monkeypatch.setattr(tiles, "input_precision", lambda _, precision=precision: precision)
        for columns in (64, 128, 448, 4096):
            for paired in (False, True):
                tile = tiles.pick_tile("rows", rows_a_group * 8, 8, columns, 1024, dtype, paired=paired)
                assert tile.descriptors == (generation >= 90 and dtype != torch.float32)
                assert tile.n <= 64 or tile.n < 2 * columns
                assert tile.k >= 16 and tile.m >= (64 if tile.descriptors else 32)


# (T, D, I, E, K) at 16,384 to 65,536 tokens, as the models train
TRAINED = {
    "DSMoE-S-E16": (65536, 384, 768, 16, 2),
    "DSMoE-S-E48": (65536, 384, 128, 48, 5),
    "DSMoE-B-E48": (32768, 768, 256, 48, 5),
    "DSMoE-L-E16": (16384, 1024, 2048, 16, 2),
    "DSMoE-L-E48": (16384, 1024, 448, 48, 5),
    "DSMoE-3B-E16": (16384, 1152, 2880, 16, 2),
}
# Rows, columns, depth, warps and stages that did best on an H200. The depth is not known of DSMoE-S-E48's and L-E48's
# up-projection, nor the former's stages.
MEASURED = {
    ("up", "DSMoE-S-E48"): (128, 64, 64, 4, 3),
    ("up", "DSMoE-L-E16"): (128, 128, 64, 8, 4),
    ("up", "DSMoE-3B-E16"): (128, 128, 64, 8, 4),
    ("up", "DSMoE-B-E48"): (128, 128, 64, 8, 4),
    ("up", "DSMoE-L-E48"): (256, 64, 64, 8, 4),
    ("rows", "DSMoE-L-E16"): (128, 256, 64, 8, 3),
    ("rows", "DSMoE-L-E48"): (128, 256, 64, 8, 3),
    ("rows", "DSMoE-B-E48"): (128, 128, 32, 4, 4),
    ("rows", "DSMoE-S-E48"): (128, 128, 32, 4, 4),
}


def of_training(kernel: str, name: str) -> Tile:
    num_tokens, hidden, inner, num_experts, top_k = TRAINED[name]
    columns, depth = (hidden, inner) if kernel == "rows" else (inner, hidden)
    rows = num_tokens * top_k
    return tiles.pick_tile(kernel, rows, num_experts, columns, depth, torch.bfloat16, paired=kernel == "up")


@pytest.mark.parametrize(("kernel", "name"), MEASURED)
def test_measured_tiles(monkeypatch, kernel, name):
    monkeypatch.setattr(tiles, "chip_generation", lambda: 90)
    tile = of_training(kernel, name)
    assert (tile.m, tile.n, tile.k, tile.warps, tile.stages) == MEASURED[kernel, name]


def test_a_tile_is_of_the_chip_and_the_precision_of_its_launch(monkeypatch):
    """Whatever was asked for before: the same shapes, by turns on two chips, with TF32 and without."""
    found = []
    for generation, precision in ((90, "ieee"), (80, "tf32"), (90, "tf32"), (80, "ieee")):
        monkeypatch.setattr(tiles, "chip_generation", lambda generation=generation: generation)
        monkeypatch.setattr(tiles, "input_precision", lambda _, precision=precision: precision)
        sizes, dtypes = (4096, 4096), (torch.float32, torch.bfloat16)
        picked = [tiles.pick_tile("rows", 65536, 8, *sizes, dtype) for dtype in dtypes]
        found.append((*picked, *(tiles.pick_weight_grad_tile(*sizes, dtype) for dtype in dtypes)))
    of_rows, of_rows_16, of_weights, of_weights_16 = zip(*found, strict=True)
    for new, old_tf32, new_tf32, old in (of_rows, of_weights):
        assert new == old and len({new, old_tf32, new_tf32}) == 3
    for new, old_tf32, new_tf32, old in (of_rows_16, of_weights_16):
        assert new == new_tf32 != old == old_tf32


@pytest.mark.parametrize("generation", [90, 100])
def test_tiles_of_training_multiply_few_zeros(monkeypatch, generation):
    """Few of them, but where a wider tile that is partly empty reads its rows less often."""
    monkeypatch.setattr(tiles, "chip_generation", lambda: generation)
    for name, (_, hidden, inner, _, _) in TRAINED.items():
        for kernel, columns in (("up", inner), ("rows", hidden), ("down_backward", inner)):
            tile = of_training(kernel, name)
            if (kernel, name) != ("down_backward", "DSMoE-L-E48"):
                assert -columns % tile.n < columns / 16, (name, kernel, tile)
        for sizes in ((2 * inner, hidden), (hidden, inner)):
            tile = tiles.pick_weight_grad_tile(*sizes, torch.bfloat16)
            padded = [size + -size % block for size, block in zip(sizes, (tile.m, tile.n), strict=True)]
            if sizes != (1024, 448):
                assert padded[0] * padded[1] < 1.07 * sizes[0] * sizes[1], (name, sizes, tile)


def test_weights_whose_rows_are_far_apart():
    """Past 2^31 elements within a tile; of the memory in between no page is touched."""
    stride, depth, columns = 70_000_000, 40, 24
    memory = torch.empty(depth * stride, dtype=torch.float16, device=DEVICE)
    w = memory.as_strided((1, depth, columns), (0, stride, 1))
    w.normal_()
    x = randn(ROWS, depth, dtype=torch.float16)
    offs = torch.tensor([ROWS], dtype=torch.int32, device=DEVICE)
    check(multiply_rows(x, w, offs, tile=TILES[0]), x @ w[0].contiguous())
