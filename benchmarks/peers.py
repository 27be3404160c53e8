"""Who else computes MoE experts: block-sparse products, MegaBlocks, ScatterMoE and SonicMoE, on this suite's weights.

What each says of itself comes from its published source, named in its docstring. Weights are brought into its layout
once, when it is built. Index arrays are given where its function takes them, as to this project's own providers; where
it makes them itself (MegaBlocks, SonicMoE) that is timed with it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.registry import Build, Provider, Shape, Where
from diffmoe_kernels import Routing, ops
from diffmoe_kernels.ops.experts.reference import activate

if TYPE_CHECKING:
    from benchmarks.experts import Experts

Compute = Callable[["Experts", Tensor], Tensor]
Adapter = Callable[["Experts"], Compute]  # prepares a module's weights, then computes with them

BLOCK = 128  # the one size of stk's kernels


def peers(shape: Shape, prepared: Callable[[Adapter], Build]) -> dict[str, Provider]:
    """The peers' providers; ``prepared`` builds the experts that an adapter takes over."""
    gated = shape.activation == "swiglu"

    def block_sparse_needs(where: Where) -> str | None:
        return (
            (None if gated else "written for experts without biases, as MegaBlocks' are")
            or (None if where.triton else "its Triton kernels need a CUDA device")
            or unusable("stk", "stanford-stk", "Matrix", "ops.sdd", "ops.dsd")
            or (f"the hidden size is no multiple of {BLOCK}" if where.resize(shape).hidden % BLOCK else None)
        )

    def megablocks_needs(where: Where) -> str | None:
        return (
            (None if gated else "its experts have no biases")
            or not_there(where, half=True)
            or unusable("megablocks", "megablocks", "Arguments", "ParallelDroplessMLP")
            or unusable("grouped_gemm", "grouped_gemm", "ops.gmm")
        )

    def scattermoe_needs(where: Where) -> str | None:
        names = "parallel_linear", "flatten_sort_count"
        return not_there(where) or unusable("scattermoe.parallel_experts", "scattermoe", *names)

    def sonicmoe_needs(where: Where) -> str | None:
        return (
            (None if gated else "its released version has gated activations only")
            or not_there(where, half=True, capability=9)
            or unusable("sonicmoe", "sonic-moe", "moe_general_routing_inputs", "enums.ActivationType.SWIGLU")
            or without_concat_layout()
        )

    return {
        "block-sparse (stanford-stk)": Provider(prepared(block_sparse), needs=block_sparse_needs),
        "MegaBlocks": Provider(prepared(megablocks), captured=False, needs=megablocks_needs),
        "ScatterMoE": Provider(prepared(scattermoe), needs=scattermoe_needs),
        "SonicMoE": Provider(prepared(sonicmoe), needs=sonicmoe_needs),
    }


def not_there(where: Where, *, half: bool = False, capability: int = 8) -> str | None:
    """Why the machine will not do, or None: the GPU's major compute capability, 16-bit floats where ``half``."""
    if where.device != "cuda":
        return "needs a CUDA device"
    if half and where.dtype == torch.float32:
        return "computes in bfloat16 and float16 only"
    found = torch.cuda.get_device_capability()
    if found[0] < capability:
        return f"needs compute capability {capability}.0 or more, this GPU has {found[0]}.{found[1]}"
    return None


def unusable(module: str, package: str, *names: str) -> str | None:
    """Why a package can't be used, or None: it is not there, does not import, or lacks one of these names."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # one that was built for another torch or GPU may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            return f"{package} is not installed: see README.md"
        message = next(iter(str(error).splitlines()), "no message")
        return f"{package} does not import: {type(error).__name__}: {message}"
    for name in names:
        try:
            attrgetter(name)(found)
        except AttributeError:
            return f"the installed {module} is another package or version than the {package} of README.md: no {name}"
    return None


def without_concat_layout() -> str | None:
    """Why the installed SonicMoE can't take weights with all gate rows first, or None."""
    from sonicmoe import moe_general_routing_inputs

    if "concat_layout" in inspect.signature(moe_general_routing_inputs).parameters:
        return None
    return "the installed sonicmoe takes gate and up rows in turn only: see README.md"


def scattermoe(experts: Experts) -> Compute:
    """ScatterMoE (github.com/shawntan/scattermoe, 0.3.0): two `parallel_linear` as its `GLUMLP` and `MLP` call them.

    The sort and the counts are `flatten_sort_count`'s, a function of its own, and given. All weights are views. The
    gates are rounded to x's dtype, which its product with them wants.
    """
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    shape = experts.shape
    order = flatten_sort_count(experts.topk_ids, num_experts=shape.experts)

    def compute(experts: Experts, x: Tensor) -> Tensor:
        into = {"expert_biases": experts.up_bias, "grouped_out": True}
        rows = parallel_linear(x, experts.up.mT, shape.top_k, *order, **into)  # (R, U)
        gates = experts.topk_weights.to(x.dtype)
        back = {"expert_biases": experts.down_bias, "grouped_in": True, "gates": gates}
        return parallel_linear(activate(rows, shape.activation), experts.down.mT, 1, *order, **back)

    return compute


def sonicmoe(experts: Experts) -> Compute:
    """SonicMoE (github.com/Dao-AILab/sonic-moe, 0.1.2.post1): `moe_general_routing_inputs`.

    It takes tokens and experts of the slots and sorts them itself, every time. All weights are views.
    """
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    shape, ids = experts.shape, experts.topk_ids
    slots = torch.arange(shape.tokens, dtype=torch.int32, device=ids.device).repeat_interleave(shape.top_k)  # ascending
    slot_experts = ids.flatten().int()

    def compute(experts: Experts, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        up, down = experts.up.permute(1, 2, 0), experts.down.permute(1, 2, 0)  # (U, D, E), (D, I, E)
        slot_weights = experts.topk_weights.flatten()
        weights = up, experts.up_bias, down, experts.down_bias, shape.experts
        how = {"is_inference_mode_enabled": not torch.is_grad_enabled(), "concat_layout": True}
        arguments = x, slot_weights, slots, slot_experts, *weights, stream, ActivationType.SWIGLU
        return moe_general_routing_inputs(*arguments, **how)[0]

    return compute


def megablocks(experts: Experts) -> Compute:
    """MegaBlocks (0.10.0): the dropless experts of its `dMoE`, without its router, in the grouped variant.

    Its sparse variant refuses Triton 3.2 and later; see `block_sparse`. Sorting, counting and both movements are
    inside, and the host waits for the counts. Gate and up are two matrices and two products.
    """
    from megablocks import Arguments, ParallelDroplessMLP

    shape, dtype = experts.shape, experts.up.dtype
    layer = ParallelDroplessMLP(
        Arguments(
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.inner,
            bias=False,
            activation_fn=F.silu,
            moe_num_experts=shape.experts,
            moe_top_k=shape.top_k,
            moe_loss_weight=0,  # else it collects every batch's scores
            mlp_type="glu",
            mlp_impl="grouped",
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            device=experts.up.device,
        )
    )
    gate, up = experts.up.detach().chunk(2, dim=1)
    own = layer.mlp.w1, layer.mlp.v1, layer.mlp.w2  # (E I, D) each
    with torch.no_grad():
        for one, weight in zip(own, (gate, up, experts.down.mT), strict=True):
            one.copy_(weight.reshape(one.shape))
    experts.up = experts.down = None
    experts.layer = layer

    def gradients() -> dict[str, Tensor]:
        gate, up, down = (one.grad.unflatten(0, (shape.experts, -1)) for one in own)
        return {"up": torch.cat([gate, up], dim=1), "down": down.mT}

    experts.gradients = gradients

    def compute(experts: Experts, x: Tensor) -> Tensor:
        weights = experts.topk_weights.to(x.dtype)  # as its router gives them
        return experts.layer(x, None, weights, experts.topk_ids)

    return compute


def block_sparse(experts: Experts) -> Compute:
    """MegaBlocks' dropless algorithm, with the products of `stk` (stanford-stk 0.7.1, in Triton).

    Each expert's rows are padded to blocks of 128, and what lies between the two products is one block-sparse matrix,
    a block row of which has the columns of one expert. Gate and up are one product, where MegaBlocks has two. The block
    indices are given; they are int32, since from Triton 3.2 on stk's kernels overflow with MegaBlocks' int16 past 255
    blocks. Rows move by this project's `permute` and `unpermute` in Triton, in the place of MegaBlocks' own kernels.

    The down-projection is laid out (E, I, D) in memory, so that all weights are views. An expert's width that is no
    multiple of 128 is padded with zeros, as MegaBlocks asks of its users.
    """
    import stk
    import stk.ops

    shape, padding = experts.shape, -experts.shape.inner % BLOCK
    movement = "triton" if experts.up.is_cuda else "torch"
    up = F.pad(experts.up.detach().unflatten(1, (2, -1)), (0, 0, 0, padding)).flatten(1, 2)  # (E, 2 I, D)
    down = F.pad(experts.down.detach(), (0, padding)).mT.contiguous().mT  # (E, D, I)
    experts.up, experts.down = nn.Parameter(up), nn.Parameter(down)

    def gradients() -> dict[str, Tensor]:
        unpadded = experts.up.grad.unflatten(1, (2, -1))[:, :, : shape.inner]
        return {"up": unpadded.flatten(1, 2), "down": experts.down.grad[..., : shape.inner]}

    experts.gradients = gradients

    routing, places = padded(experts.routing)
    block_experts = routing.row_experts[::BLOCK]
    blocks = (shape.inner + padding) // BLOCK
    wide, narrow = (topology(block_experts, count, shape.experts) for count in (2 * blocks, blocks))

    def matrix(data: Tensor, indices: tuple[Tensor, ...], count: int) -> Any:
        size = routing.num_rows, shape.experts * count * BLOCK
        return stk.Matrix(torch.Size(size), data, *indices)

    # Where the product's blocks go; its numbers are never read.
    nothing = torch.empty(len(wide[0]), BLOCK, BLOCK, dtype=up.dtype, device="meta")
    places_of_pre = matrix(nothing, wide, 2 * blocks)

    def compute(experts: Experts, x: Tensor) -> Tensor:
        gates = experts.gates.new_zeros(routing.num_rows).index_copy(0, places, experts.gates)
        placed = replace(routing, gates=gates)
        rows = ops.permute(x, placed, backend=movement)  # (P, D)
        pre = stk.ops.sdd(rows, experts.up.flatten(0, 1).t(), places_of_pre).data  # (P / 128 * 2 I / 128, 128, 128)
        gate, value = pre.unflatten(0, (-1, 2, blocks)).unbind(1)
        hidden = matrix((F.silu(gate) * value).flatten(0, 1), narrow, blocks)  # (P, E I)
        rows = stk.ops.dsd(hidden, experts.down.mT.flatten(0, 1))
        return ops.unpermute(rows, placed, backend=movement)

    return compute


def padded(routing: Routing) -> tuple[Routing, Tensor]:
    """With each expert's rows padded to whole blocks, gates left out; and (R,) where each row went.

    A padding row reads token 0, and nothing reads it.
    """
    sizes = routing.group_sizes.long()
    ends = ((sizes + BLOCK - 1) // BLOCK * BLOCK).cumsum(0)
    starts = ends - (sizes + BLOCK - 1) // BLOCK * BLOCK
    shift = starts - (routing.group_offsets - sizes)
    places = torch.arange(routing.num_rows, device=sizes.device) + shift[routing.row_experts]
    tokens = routing.token_indices.new_zeros(int(ends[-1])).index_copy(0, places, routing.token_indices)
    gates = routing.gates.detach().new_zeros(len(tokens))
    token_rows = torch.zeros_like(tokens)  # past the true count none is read
    token_rows[: routing.num_rows] = places[routing.token_rows.long()].int()
    return Routing(tokens, gates, ends.int(), routing.token_offsets, token_rows), places


def topology(block_experts: Tensor, blocks: int, num_experts: int) -> tuple[Tensor, ...]:
    """What `stk.Matrix` wants to know of a matrix whose block row i has the ``blocks`` block columns of one expert.

    Args:
        block_experts: (N,) the expert of each block row.
        blocks: of an expert's columns.
        num_experts: E.

    Returns:
        int32: row and column of each block (N blocks,), where each block row begins (N + 1,); and of the transposed
        matrix the column of each block, where each block row begins (E blocks + 1,), and each block's place here.
    """
    count, device = len(block_experts), block_experts.device
    rows = torch.arange(count, device=device).repeat_interleave(blocks)
    columns = (block_experts[:, None] * blocks + torch.arange(blocks, device=device)).flatten()
    begins = torch.arange(0, count * blocks + 1, blocks, device=device)
    places = columns.argsort(stable=True)
    begins_t = F.pad(columns.bincount(minlength=num_experts * blocks).cumsum(0), (1, 0))
    return tuple(one.int() for one in (rows, columns, begins, rows[places], begins_t, places))
