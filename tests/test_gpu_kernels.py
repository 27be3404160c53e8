"""The Triton kernels on a GPU, at the published models' sizes: values, gradients, determinism, graphs, addresses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffmoe_kernels import ExpertChoiceMoE, MoE, Routing, ops
from diffmoe_kernels.testing import assert_close, assert_error_within, relative_error
from diffmoe_kernels.triton_support import HAS_TRITON, Tile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]

# T, D, I, E, K, activation; the tokens fewer than in training, so that float64 is quick
SHAPES = {
    "DSMoE-L-E16": (4096, 1024, 2048, 16, 2, "swiglu"),
    "DSMoE-L-E48": (12288, 1024, 448, 48, 5, "swiglu"),
    "DSMoE-S-E16": (32768, 384, 768, 16, 2, "swiglu"),  # whose weight gradients programs share
    "DSMoE-S-E48": (12288, 384, 128, 48, 5, "swiglu"),
    "DSMoE-3B-E16": (9216, 1152, 2880, 16, 2, "swiglu"),
    "DiffMoE-L-E8": (4096, 1024, 4096, 8, 1, "gelu_tanh"),
    "sampling": (512, 1024, 448, 48, 5, "swiglu"),
    "odd": (1001, 72, 40, 5, 2, "silu"),
    "odder": (333, 37, 51, 3, 2, "swiglu"),
}


def inputs_of(shape: tuple, seed: int = 0) -> tuple[Routing, dict[str, Tensor]]:
    num_tokens, hidden, inner, num_experts, top_k, activation = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, device="cuda", generator=generator)

    scores = torch.rand(num_tokens, num_experts, device="cuda", generator=generator)
    weights, ids = scores.topk(top_k)
    width = inner * (2 if activation == "swiglu" else 1)
    inputs = {"x": randn(num_tokens, hidden), "up_proj": randn(num_experts, width, hidden, scale=hidden**-0.5)}
    inputs["down_proj"] = randn(num_experts, hidden, inner, scale=inner**-0.5)
    if activation == "gelu_tanh":
        inputs |= {"up_bias": randn(num_experts, width), "down_bias": randn(num_experts, hidden)}
    return Routing.from_topk(ids, weights, num_experts), inputs


def run(
    routing: Routing,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    activation: str,
    backend: str,
    rounds_to: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The result, and the gradients of a fixed weighting of it, which is rounded to a narrower dtype if given."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    gates = routing.gates.detach().requires_grad_()
    maps = routing.group_offsets, routing.token_offsets, routing.token_rows
    own = Routing(routing.token_indices, gates, *maps)
    x = leaves.pop("x")
    y = ops.experts(x, own, **leaves, activation=activation, backend=backend)
    weighting = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    weighting = weighting.to(rounds_to or dtype).to(y.dtype)
    grads = torch.autograd.grad(y, [x, gates, *leaves.values()], weighting)
    return dict(zip(["y", "x", "gates", *leaves], [y.detach(), *grads], strict=True))


# How many times PyTorch's error is allowed. In float32 a product is one chain of additions over its whole depth, where
# cuBLAS adds parts; both are at rounding's bottom.
FACTOR = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 4.0}
WAYS = [("triton", torch.bfloat16), ("triton", torch.float16), ("triton", torch.float32), ("torch", torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("name", SHAPES)
def test_experts_are_as_accurate_as_pytorch(name, backend, dtype) -> None:
    """ "torch" too, whose products are `grouped_mm`'s and all between them ours."""
    activation = SHAPES[name][-1]
    if backend == "torch" and name == "odder":
        pytest.skip("grouped_mm wants strides of whole 16 bytes")
    routing, inputs = inputs_of(SHAPES[name])
    rounded = {key: tensor.to(dtype) for key, tensor in inputs.items()}
    wide = {key: tensor.double() for key, tensor in rounded.items()}
    exact = run(routing, wide, torch.float64, activation, "reference", dtype)
    plain = run(routing, rounded, dtype, activation, "reference")
    ours = run(routing, rounded, dtype, activation, backend)
    for key, expected in exact.items():
        assert_error_within(ours[key], plain[key], expected, FACTOR[dtype], name=f"{name}, {key}, {dtype}")


@pytest.fixture
def tf32():
    """Not by monkeypatch, which would delete what this setting has by its class."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("name", ["DSMoE-L-E16", "DSMoE-L-E48", "DiffMoE-L-E8", "odd"])
def test_tf32_is_as_accurate_as_pytorch(name, tf32) -> None:
    routing, inputs = inputs_of(SHAPES[name])
    wide = {key: tensor.double() for key, tensor in inputs.items()}
    exact = run(routing, wide, torch.float64, SHAPES[name][-1], "reference", torch.float32)
    plain, ours = (run(routing, inputs, torch.float32, SHAPES[name][-1], one) for one in ("reference", "triton"))
    assert relative_error(ours["y"], exact["y"]) > 1e-5  # else it was not TF32
    for key, expected in exact.items():
        # Tensor cores cut float32 off, twice and more the error of rounding it, as cuBLAS may do before.
        assert_error_within(ours[key], plain[key], expected, 4.0, name=f"{name}, {key}, TF32")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ["DSMoE-L-E48", "DSMoE-S-E16", "DiffMoE-L-E8"])
def test_two_runs_have_the_same_bits(name, backend) -> None:
    routing, inputs = inputs_of(SHAPES[name])
    one, other = (run(routing, inputs, torch.bfloat16, SHAPES[name][-1], backend) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("sizes", [(0, 30000, 1, 2700), (0, 0, 0, 0), (8192, 8192, 8192, 8192)], ids=str)
def test_weight_gradients_of_few_tiles(sizes) -> None:
    """Programs share their steps evenly, whatever the groups are; the same bits every run, in a CUDA graph too."""
    weight_grad = pytest.importorskip("diffmoe_kernels.ops.grouped_gemm._triton_weight_grad").weight_grad
    offs = torch.tensor(sizes, device="cuda").cumsum(0, dtype=torch.int32)
    a, b = (torch.randn(32768, size, device="cuda", dtype=torch.bfloat16) for size in (384, 768))
    a[sum(sizes) :] = torch.nan
    grad, again = (weight_grad(a, b, offs, dtype=torch.float32) for _ in range(2))
    pairs = (one.double()[: sum(sizes)].split(sizes) for one in (a, b))
    exact = torch.stack([left.T @ right for left, right in zip(*pairs, strict=True)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = weight_grad(a, b, offs, dtype=torch.float32)
    graph.replay()
    assert torch.equal(grad, again) and torch.equal(grad, captured)
    # Tensor cores cut off what they add in float32, which grows with the steps of a sum.
    assert torch.equal(grad == 0, exact == 0) and (grad - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("descriptors", [False, True])
def test_tiles_that_the_copy_engine_fetches_and_others_agree(descriptors) -> None:
    if descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the bulk copy engine comes with sm_90")
    multiply_rows = pytest.importorskip("diffmoe_kernels.ops.grouped_gemm._triton").multiply_rows
    offs = torch.tensor([0, 1000, 1001, 4000], device="cuda", dtype=torch.int32)
    x = torch.randn(4096, 456, device="cuda", dtype=torch.bfloat16)
    x[4000:] = torch.nan
    tile = Tile(128, 128, 64, 8, 3, descriptors=descriptors)
    for w in (torch.randn(4, 456, 728, device="cuda"), torch.randn(4, 728, 456, device="cuda").mT):
        w = w.bfloat16()
        expected = ops.grouped_gemm(x.nan_to_num(), w, offs, backend="reference")
        assert_close(multiply_rows(x, w, offs, tile=tile)[:4000], expected[:4000])


def test_the_search_for_tiles_finds_some_that_are_right(monkeypatch, tmp_path) -> None:
    tiles = pytest.importorskip("diffmoe_kernels.ops.grouped_gemm.tiles")
    monkeypatch.setenv("DIFFMOE_AUTOTUNE", "1")
    monkeypatch.setenv("DIFFMOE_CACHE_DIR", str(tmp_path))
    tried = tiles.candidates
    monkeypatch.setattr(tiles, "candidates", lambda *args, **kinds: list(tried(*args, **kinds))[::12])
    routing, inputs = inputs_of(SHAPES["sampling"])
    found = run(routing, inputs, torch.bfloat16, "swiglu", "triton")
    assert len((tmp_path / "tiles.json").read_text().splitlines()) > 4
    monkeypatch.delenv("DIFFMOE_AUTOTUNE")
    for key, expected in run(routing, inputs, torch.bfloat16, "swiglu", "triton").items():
        assert_close(found[key], expected, name=key)


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "token choice": lambda: MoE(256, 512, 16, 2, shared_intermediate_size=512, backend="triton"),
    "many experts": lambda: MoE(256, 128, 48, 5, num_groups=4, top_groups=2, backend="triton"),
    "capacity": lambda: MoE(256, 128, 16, 2, capacity_factor=0.75, backend="triton"),
    "expert choice": lambda: ExpertChoiceMoE(256, 512, 8, backend="triton"),
    "our kernels around grouped_mm": lambda: MoE(256, 512, 16, 2, backend="torch"),
    "what auto takes": lambda: MoE(256, 512, 16, 2),
}


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [*((name, torch.bfloat16) for name in LAYERS), ("what auto takes", torch.float16), ("token choice", torch.float16)],
)
def test_a_training_step_waits_for_nothing_and_fits_in_a_graph(layer, dtype) -> None:
    layer = LAYERS[layer]().to("cuda", dtype)
    x = torch.randn(8, 256, 256, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> Tensor:
        x.grad = None
        layer.zero_grad()
        y, aux = layer(x, return_aux=True)
        own = [] if aux.loss is None else [aux.loss]  # of a capacity predictor, which learns from nothing else
        torch.autograd.backward([y, *own], [grad, *(torch.ones_like(loss) for loss in own)])
        return y.detach()  # a graph of this step that lives on would tie the next one's gradients to this stream

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates
            step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step()
        expected = [eager.clone(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for tensor in (y, x.grad, *(p.grad for p in layer.parameters())):
        tensor.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    actual = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("inference", ["pool", "token"])
def test_predicted_capacity_fits_in_a_graph(inference) -> None:
    layer = ExpertChoiceMoE(256, 512, 8, inference=inference, max_capacity_factor=4.0, backend="triton")
    layer = layer.cuda().bfloat16().eval()
    layer.expert_threshold.fill_(0.5)
    x = torch.randn(4, 256, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_addresses_past_2_to_the_31() -> None:
    """Rows whose place times their length does not fit in 32 bits: 2.2 million rows of 1,024 numbers."""
    num_tokens, hidden, inner, num_experts = 1_100_000, 1024, 64, 4
    routing, inputs = inputs_of((num_tokens, hidden, inner, num_experts, 2, "swiglu"))
    inputs = {key: tensor.bfloat16() for key, tensor in inputs.items()}
    x = inputs.pop("x").requires_grad_()
    assert routing.num_rows * hidden > 2**31
    rows = ops.permute(x, routing, backend="triton")
    assert torch.equal(rows[-5:], x[routing.token_indices[-5:].long()])
    del rows
    y = ops.experts(x, routing, **inputs, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), x)
    last = slice(num_tokens - 64, num_tokens)
    few = [routing.token_rows[routing.token_offsets[t] : routing.token_offsets[t + 1]] for t in range(num_tokens)[last]]
    experts = torch.stack([routing.row_experts[rows.long()] for rows in few])
    weights = torch.stack([routing.gates[rows.long()] for rows in few])
    small = Routing.from_topk(experts, weights, num_experts)
    tail = x[last].detach().requires_grad_()
    expected = ops.experts(tail, small, **inputs, backend="reference")
    assert relative_error(y[last], expected) < 1e-2
    assert relative_error(grad[last], torch.autograd.grad(expected.sum(), tail)[0]) < 1e-2


def test_streams_do_not_mix() -> None:
    routing, inputs = inputs_of(SHAPES["DSMoE-S-E48"])
    _, others = inputs_of(SHAPES["DSMoE-S-E48"], seed=1)
    expected = [run(routing, one, torch.bfloat16, "swiglu", "triton") for one in (inputs, others)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for stream, one in zip(streams, (inputs, others), strict=True):
        with torch.cuda.stream(stream):
            results.append(run(routing, one, torch.bfloat16, "swiglu", "triton"))
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert all(torch.equal(result[key], right[key]) for key in right)
