"""Every kernel with its default tiles, compiled for three generations of chips that are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from diffmoe_kernels.triton_support import HAS_TRITON

if HAS_TRITON:
    import triton

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a block; 8.6 and 8.9 have the least of sm_8x
# Bytes of a thread. What comes with Triton 3.6 spills a number or two in a few kernels, others on each chip.
SPILLED = 8 if HAS_TRITON and triton.__version__.startswith("3.6.") else 0
MATRIX_PRODUCTS = (
    "_experts_up_fwd_kernel",
    "_experts_down_bwd_kernel",
    "_grouped_gemm_fwd_kernel",
    "_grouped_gemm_weight_grad_kernel",
    "_grouped_gemm_weight_grad_shared_kernel",
)
WEIGHT_GRADS = MATRIX_PRODUCTS[-2:]
ATTENTION = ("_rope_attention_fwd_kernel", "_rope_attention_bwd_q_kernel", "_rope_attention_bwd_kv_kernel")
BETWEEN_PRODUCTS = ("_experts_activation_fwd_kernel", "_experts_activation_bwd_kernel", "_grouped_gemm_sum_rows_kernel")
ADALN = ("_adaln_fwd_kernel", "_adaln_bwd_kernel")
MOVEMENT = (
    *(*ADALN, *BETWEEN_PRODUCTS, "_grouped_gemm_weight_grad_parts_kernel"),
    *("_permute_fwd_kernel", "_unpermute_fwd_kernel", "_unpermute_bwd_kernel"),
)
SELECTION = (
    "_router_topk_choose_kernel",
    "_router_topk_scan_kernel",
    "_router_topk_place_kernel",
    "_token_drop_cut_kernel",
    "_token_drop_place_kernel",
    "_token_choice_drop_kernel",
    "_capacity_loss_fwd_kernel",
    "_routing_from_topk_mask_kernel",
    "_routing_from_topk_place_kernel",
    "_routing_from_topk_bwd_kernel",
    "_adaln_sum_chunks_kernel",
)


def compile_for(capability: int) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", str(capability)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: where these tests are split among them, each chip is compiled for once

    def compile_once(capability: int) -> list[dict]:
        found = folder / f"sm_{capability}.json"
        with FileLock(f"{found}.lock"):
            if not found.exists():
                found.write_text(json.dumps(compile_for(capability)))
        return json.loads(found.read_text())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CAPABILITIES, pool.map(compile_once, CAPABILITIES), strict=True))


def is_ieee_float32(row: dict) -> bool:
    """Whether a kernel's products are those that no tensor core computes."""
    return row["dtype"] == "float32" and "TF32" not in row["case"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills_and_everything_fits(compiled, capability):
    kernels = {row["kernel"] for row in compiled[capability]}
    expected = {*MATRIX_PRODUCTS, *ATTENTION, *MOVEMENT, *SELECTION}
    if capability != 90:  # there a program takes a tile
        expected = {name for name in expected if not re.search("weight_grad_(shared|parts)", name)}
    assert expected <= kernels
    for row in compiled[capability]:
        assert row["local_memory"] <= SPILLED, row
        assert row["shared"] <= SHARED_LIMIT[capability], row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_run_on_the_tensor_cores(compiled, capability):
    kernels = (*MATRIX_PRODUCTS, *ATTENTION)
    products = [row for row in compiled[capability] if row["kernel"] in kernels and not is_ieee_float32(row)]
    assert len(products) > 60
    for row in products:
        if (
            capability == 90
            and row["case"].startswith("attention wide")
            and row["kernel"] == "_rope_attention_bwd_kv_kernel"
        ):
            # Its blocks of 32 keys are too small for a group of warps.
            assert row["older_matrix_instructions"] > 0, row
            continue
        assert row["matrix_instructions"] > 0, row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_summed_in_an_order_that_varies(compiled, capability):
    for row in compiled[capability]:
        assert row["atomics"] == 0, row


def test_the_backward_of_attention_is_two_launches(compiled):
    """Each reads q, k and v once where a head is kept: twice in all."""
    for capability in CAPABILITIES:
        launches = [row["kernel"] for row in compiled[capability] if row["case"].startswith("attention JiT-L _")]
        assert launches == [
            "_rope_attention_fwd_kernel",
            "_rope_attention_fwd_kernel",
            "_rope_attention_bwd_q_kernel",
            "_rope_attention_bwd_kv_kernel",
        ]


def test_products_of_a_warp_group_do_not_wait_for_each_other(compiled):
    """What is not bfloat16 and aligned, and heads of 16 channels, may: no published model has them."""
    asynchronous = [row for row in compiled[90] if row["matrix_instructions"] and row["dtype"] == "bfloat16"]
    assert len(asynchronous) > 60
    for row in asynchronous:
        assert not row["serialized"] or "odd" in row["case"] or "narrow" in row["case"], row


def test_nothing_touches_registers_of_a_product_under_way(compiled):
    products = [row for row in compiled[90] if row["matrix_instructions"]]
    assert len(products) > 80
    for row in products:
        assert not row["hazards"], row


def test_a_hazard_is_found():
    """In listings of the one kind that `nvdisasm` prints: a sum read, a sum moved, a factor written before the wait."""
    from tests.kernels.ahead_of_time import find_hazards

    def hazards(*between: str, after: str = "") -> list[str]:
        product = "HGMMA.64x16x16.F32.BF16 R88, R24, gdesc[UR20].tnspB, R88, gsb0 "
        lines = (product, *between, "WARPGROUP.DEPBAR.LE gsb0, 0x0 ", after)
        return find_hazards("".join(f"        /*{16 * i:04x}*/  {one};\n" for i, one in enumerate(lines)))

    assert not hazards(
        "FADD R96, R24, R25 ",
        "LDS.128 R84, [R2] ",
        "STS [R2], R24 ",
        "SHF.L.U64.HI R23, R1, 0x1, R2 ",
        after="FADD R88, R95, R24 ",
    )
    for one in ("FADD R1, R2, R95 ", "@P0 MOV R88, R1 ", "LDS.128 R85, [R2] ", "MOV R27, R1 ", "LDS.64 R23, [R2] "):
        assert hazards(one), one


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operands_are_read_16_bytes_at_a_time(compiled, capability):
    rows = [row for row in compiled[capability] if row["kernel"] in (*MATRIX_PRODUCTS, *ATTENTION, *MOVEMENT)]
    assert len(rows) > 40
    for row in rows:
        if "narrow" in row["case"] and row["kernel"] in ATTENTION:
            continue  # heads of 16 channels: too few numbers in a block
        if capability >= 90 and "TF32" in row["case"] and row["kernel"] in WEIGHT_GRADS:
            continue  # such a product wants both factors with the rows side by side: they are turned on their way
        assert row["widest_load"] == 128 or row["bulk_copies"], row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_fetch_ahead(compiled, capability):
    """While a tile is multiplied the next ones are under way, in the loops with a gather too."""
    products = [row for row in compiled[capability] if row["kernel"] in MATRIX_PRODUCTS and not is_ieee_float32(row)]
    for row in products:
        is_plain = row["kernel"] == "_grouped_gemm_fwd_kernel"
        by_pointers = row["kernel"] in WEIGHT_GRADS or "TF32" in row["case"]
        if is_plain and any(name in row["case"] for name in ("DSMoE-S-E48", "wide", "odd")):
            by_pointers = True  # a depth of at most 256
        assert bool(row["bulk_copies"]) == (capability >= 90 and not by_pointers), row
        if not is_plain or not row["bulk_copies"]:  # it needs no other copies
            assert row["loads_in_flight"] > 0, row


def test_no_number_of_rows_needs_a_kernel_of_its_own(compiled):
    """How many rows there are varies from step to step; a compile in the middle of a run takes seconds."""
    rows = [row for row in compiled[90] if row["case"].startswith("transposed, ")]
    kernels = [
        {row["kernel"]: row["compiled_as"] for row in rows if f" {num} rows" in row["case"]} for num in (3000, 4096)
    ]
    assert len(kernels[0]) == 2 and kernels[0] == kernels[1]


REGISTERS, SHARED, RESERVED = 65536, 227 * 1024, 1024  # of a multiprocessor of sm_90, and what a block takes unasked


def blocks_at_once(row: dict) -> int:
    registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
    return min(REGISTERS // registers, SHARED // (row["shared"] + RESERVED))


def test_two_blocks_of_attention_fit_on_a_multiprocessor(compiled):
    """What hides the loads and exponentials of one behind the products of the other, at any width of a head."""
    kernels = (*ATTENTION, "_rope_attention_fwd_kernel 2")
    rows = [row for row in compiled[90] if row["case"].startswith("attention ") and row["dtype"] != "float32"]
    assert {row["case"].split(" _")[1] for row in rows} == {kernel.removeprefix("_") for kernel in kernels}
    assert len(rows) == len(kernels) * 13  # bfloat16 at ten sizes, float16 at three
    for row in rows:
        assert blocks_at_once(row) >= 2, row


def test_two_blocks_of_products_that_are_mostly_epilogue_fit_on_a_multiprocessor(compiled):
    """Those of DSMoE-S-E48, 128 or 256 deep or with 128 columns, so that one stores while one multiplies."""
    kernels = ("_experts_up_fwd_kernel", "_experts_down_bwd_kernel", "_grouped_gemm_fwd_kernel")
    cases = {f"experts DSMoE-S-E48 {kernel}" for kernel in (*kernels, f"{kernels[-1]} 2")}
    rows = [row for row in compiled[90] if row["case"] in cases]
    assert len(rows) == len(cases)
    for row in rows:
        assert blocks_at_once(row) >= 2, row


def test_the_backward_of_adaln_is_one_wave(compiled):
    """Of 64 samples of 256 tokens: a second wave would leave most multiprocessors with nothing."""
    from diffmoe_kernels.ops.adaln._triton import MOST

    cases = {f"adaln {name} _adaln_bwd_kernel 2" for name in ("DSMoE-L", "DSMoE-3B")}
    rows = [row for row in compiled[90] if row["case"] in cases]
    assert len(rows) == len(cases)
    for row in rows:
        assert 132 * blocks_at_once(row) >= 64 * -(-256 // MOST), row


# name -> microseconds that an H200 needs at least to issue attention's instructions at 1.7 GHz: forward, with its
# log-sum-exp, and backward. The goals in a run are 85 62 80 80 163, and 400 300 360 400 650 for both.
ISSUED = {"DSMoE-S": (45, 100), "DSMoE-L": (30, 66), "DSMoE-3B": (38, 92), "JiT-L": (53, 138), "512 px": (113, 283)}


def issue_time(row: dict, batch: int, num_tokens: int, num_heads: int) -> float:
    """A warp has 16 rows of a block. A program takes one, with 64 others at a time, or all where it keeps those."""
    blocks = -(-num_tokens // (16 * row["warps"]))
    if len(row["instructions"]) == 2:
        once, for_block = row["instructions"]
        programs, issued = batch * num_heads, once + blocks * for_block
    else:
        once, in_step, for_block = row["instructions"]
        programs, issued = batch * num_heads * blocks, once + for_block + -(-num_tokens // 64) * in_step
    return programs * row["warps"] * issued / (132 * 4 * 1.7e3)


@pytest.mark.parametrize("shape", ISSUED)
def test_attention_issues_few_instructions(compiled, shape):
    """What bounds it at these lengths, before memory does: benchmarks/NOTES.md."""
    from tests.kernels.cases import ATTENTION as SIZES

    rows = {row["case"].removeprefix(f"attention {shape} "): row for row in compiled[90]}
    forward, *backward = (issue_time(rows[kernel], *SIZES[shape][:3]) for kernel in ATTENTION)
    most_forward, most_backward = ISSUED[shape]
    assert forward <= most_forward and sum(backward) <= most_backward, (forward, backward)
