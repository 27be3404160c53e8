"""The adapters of `benchmarks.peers`: right in value and gradient, or a reason.

Packages that are not there are stood in for by plain PyTorch with the functions that their sources document.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import experts, peers
from benchmarks.measure import outcome
from benchmarks.registry import BOTH, CPU, GPU, Case, Shape, Where, close
from diffmoe_kernels.triton_support import HAS_TRITON

HERE = replace(CPU, resize=lambda shape: shape, triton=True)
GATED = Shape(tokens=9, hidden=128, inner=24, experts=16, top_k=3)  # more experts than are chosen
UNGATED = replace(GATED, top_k=1, activation="gelu_tanh")
STK, MEGABLOCKS, SCATTERMOE, SONICMOE = NAMES = (
    "block-sparse (stanford-stk)",
    "MegaBlocks",
    "ScatterMoE",
    "SonicMoE",
)


def case(shape: Shape) -> Case:
    """The training case of that activation, at another shape."""
    name = "DSMoE-L-E48" if shape.activation == "swiglu" else "DiffMoE-L-E8"
    (found,) = (one for one in experts.cases(HERE) if (one.name, one.direction) == (name, BOTH))
    return replace(found, shape=shape, providers=found.providers | peers.peers(shape, experts.prepared))


def checked(name: str, shape: Shape, where: Where = HERE) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A peer's module, what it computed, and what the reference did, which is the same."""
    how = case(shape)
    module = how.providers[name].module(shape, where)
    found = outcome(module, how.inputs(shape, where), BOTH)
    torch.manual_seed(0)
    right = outcome(how.reference(shape, where, where.dtype), how.inputs(shape, where), BOTH)
    close(found, right, where.dtype)
    return module, found, right


def compared(found: dict[str, Any], right: dict[str, Any]) -> set[str]:
    return {name.removeprefix("grad of ") for name in found.keys() & right.keys()} - {"result"}


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@dataclass
class Matrix:
    """As `stk.Matrix`, whose blocks are 128 wide."""

    size: tuple[int, int]
    data: Tensor
    row_indices: Tensor
    column_indices: Tensor
    offsets: Tensor
    column_indices_t: Tensor
    offsets_t: Tensor
    block_offsets_t: Tensor


def sdd(a: Tensor, b: Tensor, topology: Matrix) -> Matrix:
    assert (a.shape[0], b.shape[1]) == topology.size
    rows, columns = a.unflatten(0, (-1, 128)), b.unflatten(1, (-1, 128)).transpose(0, 1)
    return replace(topology, data=rows[topology.row_indices] @ columns[topology.column_indices])


def dsd(a: Matrix, b: Tensor) -> Tensor:
    assert b.shape[0] == a.size[1]
    products = a.data @ b.unflatten(0, (-1, 128))[a.column_indices]
    return products.new_zeros(a.size[0] // 128, *products.shape[1:]).index_add(0, a.row_indices, products).flatten(0, 1)


@pytest.fixture
def stk(monkeypatch) -> None:
    operations = install(monkeypatch, "stk.ops", sdd=sdd, dsd=dsd)
    install(monkeypatch, "stk", Matrix=Matrix, ops=operations)


@pytest.fixture
def installed_stk() -> None:
    if not HAS_TRITON or peers.unusable("stk", "stanford-stk", "Matrix", "ops.sdd", "ops.dsd"):
        pytest.skip("needs stanford-stk and triton")


@pytest.mark.parametrize("package", ["stk", "installed_stk"])
@pytest.mark.parametrize("inner", [128, 24])
def test_block_sparse(request, package: str, inner: int) -> None:
    """With the package itself too, in Triton's interpreter."""
    request.getfixturevalue(package)
    module, found, right = checked(STK, replace(GATED, inner=inner))
    assert compared(found, right) == {"x", "up", "down", "gates"}
    up, down = module.up.grad.unflatten(1, (2, 128)), module.down.grad
    assert not up[:, :, inner:].any() and not down[:, :, inner:].any()  # the padding stays 0


def test_block_sparse_weights_are_views(stk) -> None:
    """Nothing is laid out anew in a run."""
    module = case(GATED).providers[STK].module(GATED, HERE)
    assert module.down.mT.is_contiguous() and module.up.is_contiguous()


def test_rows_are_padded_to_blocks() -> None:
    routing = experts.of(experts.exact)(replace(GATED, tokens=300, experts=3), HERE, torch.float32).routing
    padded, places = peers.padded(routing)
    assert (padded.group_sizes % 128 == 0).all() and (padded.group_sizes - routing.group_sizes < 128).all()
    assert torch.equal(padded.token_indices[places], routing.token_indices)
    assert torch.equal(padded.row_experts[places], routing.row_experts)
    assert torch.equal(places[routing.token_rows.long()], padded.token_rows[: routing.num_rows].long())
    assert padded.token_rows.shape == padded.token_indices.shape


def test_topology_of_both_orders() -> None:
    rows, columns, begins, columns_t, begins_t, places = peers.topology(torch.tensor([0, 0, 3, 1]), 2, 5)
    assert {one.dtype for one in (rows, columns, begins, columns_t, begins_t, places)} == {torch.int32}
    blocks = torch.zeros(4, 10)
    blocks[rows, columns] = torch.arange(1.0, 9)
    assert blocks.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 6], [2, 7], [3, 2], [3, 3]]
    assert begins.tolist() == [0, 2, 4, 6, 8]
    transposed = torch.zeros(10, 4)
    transposed[torch.arange(10).repeat_interleave(begins_t.diff()), columns_t] = places + 1.0
    assert torch.equal(transposed, blocks.T)


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sorted_experts, slots = expert_idxs.flatten().sort()
    return sorted_experts, slots, sorted_experts.bincount(minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,  # (E, in, out)
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    assert len(expert_offsets) == len(expert_weights)
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    out = torch.einsum("rk,rkn->rn", rows, expert_weights[sorted_expert_idxs])
    if expert_biases is not None:
        out = out + expert_biases[sorted_expert_idxs]
    if not grouped_out:
        out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
    return out if gates is None else (gates.unsqueeze(1) @ out.unflatten(0, gates.shape)).squeeze(1)


@pytest.mark.parametrize("shape", [GATED, UNGATED])
def test_scattermoe(monkeypatch, shape: Shape) -> None:
    install(monkeypatch, "scattermoe")
    functions = {"parallel_linear": parallel_linear, "flatten_sort_count": flatten_sort_count}
    install(monkeypatch, "scattermoe.parallel_experts", **functions)
    _, found, right = checked(SCATTERMOE, shape)
    biases = {"up_bias", "down_bias"} if shape is UNGATED else set()
    assert compared(found, right) == {"x", "up", "down", "topk_weights", *biases}


class ActivationType(Enum):
    SWIGLU = "swiglu"


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,  # (2 I, D, E)
    b1: Tensor | None,
    w2: Tensor,  # (D, I, E)
    b2: Tensor | None,
    E: int,  # noqa: N803
    stream_id: int,
    activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    assert activation_type is ActivationType.SWIGLU and b1 is None and b2 is None and not is_inference_mode_enabled
    assert token_indices.dtype == expert_indices.dtype == torch.int32 and (token_indices.diff() >= 0).all()
    assert w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous() and w1.shape[-1] == E
    pre = torch.einsum("rd,ndr->rn", x[token_indices], w1[:, :, expert_indices])
    gate, value = pre.chunk(2, dim=-1) if concat_layout else (pre[:, ::2], pre[:, 1::2])
    rows = torch.einsum("ri,dir->rd", F.silu(gate) * value, w2[:, :, expert_indices])
    out = torch.zeros_like(x).index_add(0, token_indices, rows * router_scores[:, None])
    return out, expert_indices.bincount(minlength=E)


def install_sonicmoe(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    enums = install(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)
    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=function, enums=enums)


def test_sonicmoe(monkeypatch) -> None:
    install_sonicmoe(monkeypatch, moe_general_routing_inputs)
    _, found, right = checked(SONICMOE, GATED)
    assert compared(found, right) == {"x", "up", "down", "topk_weights"}


@dataclass
class Arguments:
    """As MegaBlocks', of the fields that matter here."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    bias: bool = True
    activation_fn: Callable[[Tensor], Tensor] | None = None
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_loss_weight: float = 0.1
    mlp_type: str = "mlp"
    mlp_impl: str = "sparse"
    fp16: bool = True
    bf16: bool = False
    device: Any = None


class ParallelDroplessMLP(nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        assert (args.mlp_type, args.mlp_impl, args.bias, args.moe_loss_weight) == ("glu", "grouped", False, 0)
        assert not (args.fp16 or args.bf16)
        self.args, self.mlp = args, nn.Module()
        for name in ("w1", "v1", "w2"):
            size = args.moe_num_experts * args.ffn_hidden_size, args.hidden_size
            self.mlp.register_parameter(name, nn.Parameter(torch.randn(size, device=args.device)))

    def forward(self, x: Tensor, scores: None, expert_weights: Tensor, top_experts: Tensor) -> Tensor:
        assert top_experts.shape == (len(x), self.args.moe_top_k)
        gate, value, back = (weight.unflatten(0, (self.args.moe_num_experts, -1)) for weight in self.mlp.parameters())
        pre, up = (torch.einsum("td,tkid->tki", x, weight[top_experts]) for weight in (gate, value))
        rows = torch.einsum("tki,tkid->tkd", self.args.activation_fn(pre) * up, back[top_experts])
        return (rows * expert_weights[..., None]).sum(1)


def test_megablocks(monkeypatch) -> None:
    install(monkeypatch, "megablocks", Arguments=Arguments, ParallelDroplessMLP=ParallelDroplessMLP)
    _, found, right = checked(MEGABLOCKS, GATED)
    assert compared(found, right) == {"x", "up", "down", "topk_weights"}


def reasons(where: Where, shape: Shape = GATED) -> dict[str, str | None]:
    return {name: case(shape).providers[name].why_not(where) for name in NAMES}


@pytest.fixture
def hopper(monkeypatch) -> Where:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return replace(GPU, triton=True)


def test_every_training_case_lists_every_peer() -> None:
    listed = [one for one in experts.cases(CPU) if one.name in experts.TRAINING and one.direction == BOTH]
    assert len(listed) == len(experts.TRAINING)
    for one in listed:
        assert all(one.providers[name].why_not(CPU) for name in NAMES)


def test_reasons_on_a_cpu() -> None:
    needs = "needs a CUDA device"
    expected = {STK: "its Triton kernels need a CUDA device", MEGABLOCKS: needs, SCATTERMOE: needs, SONICMOE: needs}
    assert reasons(CPU) == expected


def test_reasons_where_nothing_is_installed(monkeypatch, hopper) -> None:
    packages = {"stk": "stanford-stk", "megablocks": "megablocks", "scattermoe": "scattermoe", "sonicmoe": "sonic-moe"}
    for module in [one for one in sys.modules if one.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [])  # nothing that is not imported yet is found
    expected = [f"{package} is not installed: see README.md" for package in packages.values()]
    assert list(reasons(hopper).values()) == expected


def test_reasons_where_other_packages_have_the_names(monkeypatch, hopper) -> None:
    for module in ("stk", "megablocks", "scattermoe", "scattermoe.parallel_experts", "sonicmoe"):
        install(monkeypatch, module)
    found = reasons(hopper)
    missing = ("Matrix", "Arguments", "parallel_linear", "moe_general_routing_inputs")
    for reason, name in zip(found.values(), missing, strict=True):
        assert "another package or version" in reason and reason.endswith(f"no {name}")
    assert "the stanford-stk of README.md" in found[STK]


def test_reason_of_a_package_that_does_not_import(monkeypatch, hopper, tmp_path) -> None:
    monkeypatch.delitem(sys.modules, "stk", raising=False)
    (tmp_path / "stk.py").write_text("raise OSError('libtorch_cuda.so: no such file\\nand so on')")
    monkeypatch.syspath_prepend(tmp_path)
    assert reasons(hopper)[STK] == "stanford-stk does not import: OSError: libtorch_cuda.so: no such file"
    (tmp_path / "stk.py").write_text("import a_module_that_is_not_there")
    found = reasons(hopper)[STK]
    assert found == "stanford-stk does not import: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"


def test_reasons_of_shape_dtype_and_chip(monkeypatch, hopper, stk) -> None:
    install_sonicmoe(monkeypatch, moe_general_routing_inputs)
    install(monkeypatch, "megablocks", Arguments=Arguments, ParallelDroplessMLP=ParallelDroplessMLP)
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)
    found = reasons(hopper)
    assert found[STK] is None and found[SONICMOE] is None
    assert found[MEGABLOCKS] == "grouped_gemm is not installed: see README.md"
    assert reasons(hopper, replace(GATED, hidden=192))[STK] == "the hidden size is no multiple of 128"
    assert reasons(replace(hopper, dtype=torch.float32))[SONICMOE] == "computes in bfloat16 and float16 only"
    biased = reasons(hopper, UNGATED)
    assert biased[STK] == "written for experts without biases, as MegaBlocks' are"
    assert biased[MEGABLOCKS] == "its experts have no biases"
    assert biased[SONICMOE] == "its released version has gated activations only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert reasons(hopper)[SONICMOE] == "needs compute capability 9.0 or more, this GPU has 8.6"
    assert reasons(hopper)[STK] is None


def test_reason_of_a_sonicmoe_with_other_weights(monkeypatch, hopper) -> None:
    install_sonicmoe(monkeypatch, lambda x, w1, w2: None)
    assert reasons(hopper)[SONICMOE] == "the installed sonicmoe takes gate and up rows in turn only: see README.md"
