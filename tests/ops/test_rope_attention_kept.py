"""The attention kernels as they run from sm_90 on, in the interpreter: all of a short head kept in shared memory, heads
in two tiles, and the tiles of longer samples."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.ops.test_rope_attention_triton import check, inputs_of

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
LOW = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Those of sm_90; in tests of other files the interpreter takes those of sm_80."""
    module = pytest.importorskip("diffmoe_kernels.ops.rope_attention.tiles")
    monkeypatch.setattr(module, "chip_generation", lambda: 90)
    return module


def ungrouped(num_tokens: int, head_dim: int, **options: object) -> tuple[dict, dict]:
    """`inputs_of` with a key head to each query head: those of a group are not kept for the keys' gradients."""
    inputs, options = inputs_of(num_tokens, head_dim, **options)
    samples = 2 if num_tokens < 100 else 1
    inputs["qkv"] = torch.randn(samples, num_tokens, 6, head_dim)
    return inputs, {**options, "num_kv_heads": 2}


@pytest.mark.parametrize("num_tokens", [1, 17, 64, 65, 128, 288, 320])
def test_lengths_that_are_kept(num_tokens, tiles):
    for kernel in ("forward", "query_backward", "key_backward"):
        assert tiles.pick_tile(kernel, torch.bfloat16, 32, "rmsnorm", num_tokens).kept == math.ceil(num_tokens / 64)
    check(*ungrouped(num_tokens, 32, norm="rmsnorm", prefix=min(num_tokens, 3)), *LOW)


@pytest.mark.parametrize("dtype", [*LOW, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_a_length_that_is_not_kept(dtype, tiles):
    for kernel in ("forward", "query_backward", "key_backward"):
        assert tiles.pick_tile(kernel, dtype, 32, "none", 321).kept == 0
    check(*inputs_of(1000, 32, heads=1), dtype)


def test_that_length_in_float32(tiles, monkeypatch):
    """In tiles of 16-bit numbers: its own are a sixteenth of them, which takes the interpreter a minute."""
    monkeypatch.setattr(tiles, "pick_tile", lambda *_: tiles.AttentionTile(64, 64, 4))
    check(*inputs_of(1000, 32, heads=1), torch.float32)


def test_a_prefix_of_more_than_a_block():
    check(*ungrouped(140, 32, rope="2d_interleaved", norm="rmsnorm", prefix=70), *LOW)


def test_a_group_of_query_heads(tiles):
    assert tiles.pick_tile("key_backward", torch.bfloat16, 32, "none", 100, 2).kept == 0
    check(*inputs_of(100, 32, norm="layernorm"), *LOW)


@pytest.mark.parametrize(
    ("head_dim", "half", "tail"),
    [
        (8, 8, 0),
        (16, 8, 0),
        (32, 16, 0),
        (40, 16, 8),
        (64, 32, 0),
        (72, 32, 8),
        (96, 32, 16),
        (128, 64, 0),
    ],
)
@pytest.mark.parametrize("rope", ["1d", "2d", "2d_interleaved", None])
def test_widths_in_one_tile_or_two(head_dim, half, tail, rope, tiles):
    assert tiles.pairs_of_tiles(head_dim, "none") == (half, tail)
    assert tiles.pairs_of_tiles(head_dim, "rmsnorm") == (max(half, tail, half * 2 * (tail > 0)), 0)
    check(*ungrouped(66, head_dim, rope=rope), torch.bfloat16)


def test_older_chips_have_a_head_in_one_tile(monkeypatch, tiles):
    monkeypatch.setattr(tiles, "chip_generation", lambda: 80)
    assert [tiles.pairs_of_tiles(head_dim, "none") for head_dim in (64, 72, 96)] == [(32, 0), (64, 0), (64, 0)]


@pytest.mark.parametrize("head_dim", [72, 96, 128])
def test_norms_of_wide_heads(head_dim):
    check(*ungrouped(66, head_dim, norm="layernorm"), torch.bfloat16)
    check(*ungrouped(66, head_dim, rope="2d_interleaved", norm="rmsnorm"), torch.float16)


def test_wide_heads_past_what_shared_memory_holds(tiles):
    assert tiles.pick_tile("forward", torch.bfloat16, 128, "none", 200).kept == 0
    assert tiles.pick_tile("forward", torch.bfloat16, 72, "none", 256).kept == 4
    check(*ungrouped(200, 128), torch.bfloat16)
    check(*ungrouped(260, 72), torch.bfloat16)


def test_one_program_or_several_a_head_have_the_same_bits(monkeypatch, tiles):
    """How many there are depends on the batch and on the chip."""
    inputs, options = ungrouped(130, 32, norm="rmsnorm")
    results = []
    for programs in (1, 2, 3):
        for name in ("_triton", "_triton_backward"):
            module = sys.modules[f"diffmoe_kernels.ops.rope_attention.{name}"]
            monkeypatch.setattr(module, "programs_of_head", lambda tile, blocks, *_, most=programs: min(blocks, most))
        leaves = {name: one.bfloat16().requires_grad_() for name, one in inputs.items()}
        y = ops.rope_attention(**leaves, **options, backend="triton")
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_a_full_device_has_one_program_a_head(monkeypatch, tiles):
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    tile = tiles.pick_tile("forward", torch.bfloat16, 64, "none", 256)
    found = [tiles.programs_of_head(tile, 4, heads, torch.empty(0)) for heads in (16, 64, 128, 264, 1024)]
    assert found == [4, 4, 2, 1, 1]
    assert tiles.programs_of_head(tiles.AttentionTile(64, 64, 4), 16, 1024, torch.empty(0)) == 16


NUM_TRIED = 13  # shapes of tiles of an opt-in search; `test_the_tiles_that_a_search_tries` counts them


def tried_for(tiles, kernel: str, num_tokens: int) -> list:
    """Without those that differ in the compiler's registers alone."""
    tried = list(tiles.candidates(kernel, torch.bfloat16, num_tokens, keeps=True))
    assert len(set(tried)) == len(tried) == NUM_TRIED + 3
    return [tile for tile in tried if tile.registers is None]


@pytest.mark.parametrize("index", range(NUM_TRIED))
def test_any_tile_of_a_search_is_right(monkeypatch, tiles, index):
    """With a norm and a prefix, none of whose lengths it divides."""

    def take(kernel, launch, qkv, *_):
        return tried_for(tiles, kernel, qkv.shape[1])[index]

    for name in ("_triton", "_triton_backward"):
        monkeypatch.setattr(sys.modules[f"diffmoe_kernels.ops.rope_attention.{name}"], "best_attention_tile", take)
    check(*ungrouped(135, 32, norm="rmsnorm", prefix=3), torch.bfloat16)


def test_the_tiles_that_a_search_tries(tiles):
    forward = {(tile.m, tile.n, tile.kept) for tile in tried_for(tiles, "forward", 256)}
    assert {kept for *_, kept in forward} == {0, 1, 2, 4}
    for kernel in ("forward", "query_backward", "key_backward"):
        tried = tried_for(tiles, kernel, 256)
        turned = {(tile.n, tile.m, tile.kept) for tile in tried}  # what it has of its own is keys
        assert (turned if kernel == "key_backward" else {(tile.m, tile.n, tile.kept) for tile in tried}) == forward
        for norm, num_tokens in (("none", 256), ("none", 1024), ("rmsnorm", 256)):
            tile = tiles.pick_tile(kernel, torch.bfloat16, 64, norm, num_tokens)
            assert tile in tiles.candidates(kernel, torch.bfloat16, num_tokens, keeps=tile.kept > 0)
        assert not any(tile.kept for tile in tiles.candidates(kernel, torch.bfloat16, 256, keeps=False))
        tile = tiles.pick_tile(kernel, torch.float32, 64, "none", 256)
        assert tile in tiles.candidates(kernel, torch.float32, 256, keeps=False)


def test_huge_scores_stay_finite():
    inputs, options = ungrouped(140, 32)
    inputs["qkv"][:, 77] *= 1e4
    qkv = inputs["qkv"].bfloat16().requires_grad_()
    y = ops.rope_attention(qkv, **options, backend="triton")
    (grad,) = torch.autograd.grad(y.float().square().sum(), qkv)
    assert y.isfinite().all() and grad.isfinite().all()
