"""`router_topk` on the kernels: the reference's record, its gradients, and how they are launched."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diffmoe_kernels import ops
from diffmoe_kernels.cuda_support import ON_CPU, extension
from diffmoe_kernels.operator import launchers
from diffmoe_kernels.ops.router_topk import _library
from diffmoe_kernels.testing import assert_close, poisoned_allocations
from tests.ops.backends import CUDA, KERNELS, TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = ("topk_weights", "router_scores", "gates")
# T, E, K
SIZES = [(1, 1, 1), (9, 1, 1), (1, 2, 2), (31, 6, 1), (32, 8, 2), (70, 48, 5), (129, 3, 3), (33, 130, 4), (34, 256, 16)]
SIZES += [(5, 48, 40)]  # more choices than a warp has lanes
OPTIONS = [
    {},
    {"score_function": "softmax", "normalize_weights": False, "scaling_factor": 2.5},
    {"num_groups": 3, "top_groups": 2},
    {"num_groups": 4, "top_groups": 1, "masked_group_fill": 0.0, "score_function": "softmax"},
    {"num_groups": 12, "top_groups": 5},
    {"num_groups": 2, "top_groups": 2},
]


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def on_device():
    """Inputs are made where the kernels run: on the GPU, or interpreted on the CPU."""
    with torch.device(DEVICE):
        yield


def fields(out):
    """Every tensor of a `RouterTopK`, by name."""
    record = {field.name: getattr(out.routing, field.name) for field in dataclasses.fields(out.routing)}
    return {**record, "topk_ids": out.topk_ids, "topk_weights": out.topk_weights, "router_scores": out.router_scores}


def run(backend, logits, top_k, **options):
    with poisoned_allocations():
        return fields(ops.router_topk(logits, top_k, backend=backend, **options))


def check(backend, logits, top_k, **options):
    ours, expected = (run(which, logits, top_k, **options) for which in (backend, "reference"))
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, name=name)
    return ours


@pytest.mark.parametrize("num_tokens, num_experts, top_k", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_sizes(backend, num_tokens, num_experts, top_k, with_bias):
    check(
        backend,
        torch.randn(num_tokens, num_experts),
        top_k,
        expert_bias=torch.randn(num_experts) if with_bias else None,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_options(backend, options, dtype):
    """Biases of either sign, ties among bfloat16 logits, 5 or 12 experts a group, one of them alone."""
    for num_experts, top_k in ((60, 5), (12, 2)):
        bias = torch.randn(num_experts, dtype=torch.float64)
        check(backend, torch.randn(37, num_experts).to(dtype), top_k, expert_bias=bias, **options)


def test_ties(backend):
    check(backend, torch.zeros(40, 12), 5)
    check(backend, torch.zeros(40, 12), 5, num_groups=4, top_groups=2)
    check(backend, torch.randint(-1, 2, (67, 48)).float(), 6, num_groups=3, top_groups=2)
    check(backend, torch.full((33, 7), 40.0) + torch.arange(7), 3)  # all sigmoids round to 1


def test_all_tokens_on_one_expert(backend):
    logits = torch.randn(70, 9)
    logits[:, 4] += 20
    ours = check(backend, logits, 1)
    assert ours["token_indices"].tolist() == list(range(70)) and ours["group_offsets"].tolist() == [0] * 4 + [70] * 5


def test_no_tokens(backend):
    logits = torch.zeros(0, 8, requires_grad=True)
    sum(run(backend, logits, 3)[name].sum() for name in FLOATS).backward()
    assert logits.grad.shape == (0, 8)
    check(backend, torch.zeros(0, 8), 3)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_values_that_are_not_finite(backend, score_function):
    logits = torch.randn(35, 10)
    logits[::3, 2], logits[1::3, 7], logits[2::5, 4], logits[4] = math.nan, -math.inf, math.inf, -math.inf
    bias = torch.randn(10)
    bias[1], bias[5] = -math.inf, math.inf
    for options in ({}, {"num_groups": 5, "top_groups": 4}):
        ours, expected = (
            run(which, logits, 6, expert_bias=bias, score_function=score_function, **options)
            for which in (backend, "reference")
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, equal_nan=True)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("scan", [1, 2])
def test_more_blocks_than_a_step_of_the_scan(backend, scan, monkeypatch):
    monkeypatch.setattr(launchers("router_topk", backend), "SCAN", scan)
    check(backend, torch.randn(150, 5), 2)


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("num_tokens", [256 * 32 + 1, 20000])
def test_chunks_of_more_tokens_than_a_warp(backend, num_tokens):
    """Up to 256 chunks, of 33 tokens and of 79; the last one is not full."""
    check(backend, torch.randn(num_tokens, 3), 2)


@pytest.mark.parametrize("backend", [CUDA])
def test_chunks_of_more_tokens_than_a_block(backend):
    """257 tokens a chunk, one more than `router_topk_place_kernel` ranks at once; all its warps clear their bits."""
    if not ON_CPU:
        pytest.skip("the order is the GPU's")
    try:
        extension.set_thread_order(1)
        check(backend, torch.randn(256 * 257, 48), 2)
    finally:
        extension.set_thread_order(0)


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("order", [-1, 1, 2])
def test_threads_in_any_order(backend, order):
    """A barrier too few would let one thread read what another has not yet written."""
    if not ON_CPU:
        pytest.skip("the order is the GPU's")
    try:
        extension.set_thread_order(order)
        for num_tokens, num_experts, top_k in SIZES[5:]:
            logits = torch.randn(num_tokens, num_experts, requires_grad=True)
            out = check(backend, logits, top_k, num_groups=1)
            sum(out[name].square().sum() for name in FLOATS).backward()
    finally:
        extension.set_thread_order(0)


@pytest.mark.parametrize("options", [*OPTIONS[:3], {"score_function": "softmax", "scaling_factor": 0.5}])
@pytest.mark.parametrize("used", [("topk_weights",), ("router_scores",), ("gates",), FLOATS])
def test_gradients(backend, used, options):
    for num_tokens, num_experts, top_k in ((35, 12, 3), (9, 48, 1), (3, 132, 4)):
        logits, bias = torch.randn(num_tokens, num_experts), torch.randn(num_experts)
        grads = []
        for which, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            leaf = logits.to(dtype, copy=True).requires_grad_()
            out = run(which, leaf, top_k, expert_bias=bias, **options)
            generator = torch.Generator(DEVICE).manual_seed(0)
            loss = sum((out[name] * torch.randn(out[name].shape, generator=generator)).sum() for name in used)
            loss.backward()
            grads.append(leaf.grad)
        assert_close(grads[0], grads[1].float())


def test_gradient_of_stride_0_and_of_no_output(backend):
    logits = torch.randn(5, 6, requires_grad=True)
    run(backend, logits, 2, normalize_weights=False)["router_scores"].sum().backward()
    scores = logits.detach().sigmoid()
    assert_close(logits.grad, scores * (1 - scores))
    out = ops.router_topk(logits, 2, backend=backend)
    integers = (out.topk_ids, *(tensor for name, tensor in fields(out).items() if name not in FLOATS))
    assert out.routing.gates.requires_grad and not any(tensor.requires_grad for tensor in integers)


def test_same_bits_every_run(backend):
    logits = torch.randn(70, 48, requires_grad=True)
    runs = []
    for _ in range(2):
        out = run(backend, logits, 5)
        (grad,) = torch.autograd.grad(sum(out[name].square().sum() for name in FLOATS), logits)
        runs.append({**out, "grad": grad})
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend, with_bias):
    logits = torch.randn(7, 6, requires_grad=True)
    bias = torch.randn(6) if with_bias else None
    torch.library.opcheck(_library._router_topk.overload, (logits, bias, 2, True, 3, 2, -math.inf, True, 0.5, backend))
    out = _library._router_topk(logits.detach(), bias, 2, False, 1, 1, 0.0, True, 0.5, backend)
    saved, options = (out[1], out[3], out[7]), (False, True, 0.5, torch.bfloat16, backend)
    grads = torch.randn(7, 2), None, torch.randn(14)
    torch.library.opcheck(_library._router_topk_backward.overload, (*saved, *grads, *options))


def test_compiles_whole(backend):
    logits, bias = torch.randn(40, 6), torch.randn(6)

    def loss(logits):
        out = fields(ops.router_topk(logits, 2, expert_bias=bias, backend=backend))
        return sum(out[name].square().sum() for name in FLOATS), out

    eager, compiled = (one.requires_grad_() for one in (logits.clone(), logits.clone()))
    expected_loss, expected = loss(eager)
    our_loss, ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    expected_loss.backward()
    our_loss.backward()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(compiled.grad, eager.grad)


def test_on_the_meta_device(backend):
    out = fields(ops.router_topk(torch.empty(5, 6, device="meta"), 2, backend="reference"))
    ours = fields(ops.router_topk(torch.empty(5, 6, device="meta"), 2, backend=backend))
    for name, tensor in out.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name


class Allocations(TorchDispatchMode):
    """Refuses every PyTorch operator but those that launch nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ in ("empty", "new_empty", "empty_like"), function
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch, backend):
    """Returns the names of the kernels launched since it was last called."""
    if backend == "cuda":
        if not ON_CPU:
            pytest.skip("counts where the extension is built for the CPU")
        extension.take_launched()
        return extension.take_launched
    names = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                names.append(self.name)
                with _disable_current_modes():  # the interpreter's own copies
                    self.kernel[grid](*args, **options)

            return launch

    for module in (launchers("router_topk", name) for name in ("triton", "triton_backward")):
        for name in (*LAUNCHES["triton"], "_router_topk_bwd_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))

    def take():
        taken, names[:] = names[:], []
        return taken

    return take


LAUNCHES = {
    "triton": ["_router_topk_choose_kernel", "_router_topk_scan_kernel", "_router_topk_place_kernel"],
    "cuda": ["router_topk_choose", "router_topk_place"],
}


def test_three_launches_or_two_and_one(backend, launched):
    logits, bias = torch.randn(70, 12), torch.randn(12)
    kernels = launchers("router_topk", backend)
    with Allocations():
        out = kernels.router_topk_fwd(logits, bias, 3, True, 3, 2, -math.inf, True, 1.0)
    assert launched() == LAUNCHES[backend]
    with Allocations():
        kernels.router_topk_bwd(*out[:3], out[1], out[3], out[7], True, True, 1.0, torch.float32)
    assert len(launched()) == 1


def test_too_many_experts_are_refused(backend):
    logits = torch.zeros(2, 257)
    with pytest.raises(NotImplementedError, match="run here: the kernels take up to 256 experts, not 257"):
        ops.router_topk(logits, 2, backend=backend)
    with pytest.raises(NotImplementedError, match="not torch.float64"):
        ops.router_topk(logits[:, :9].double(), 2, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_tokens, num_experts, top_k", [(65536, 48, 5), (262144, 16, 2), (16384, 256, 8), (4096, 64, 6), (100003, 48, 5)]
)
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_real_sizes(backend, num_tokens, num_experts, top_k, score_function):
    """bfloat16 logits: few values, many ties, and no two scores that rounding could swap."""
    logits = torch.randn(num_tokens, num_experts).bfloat16()
    check(backend, logits, top_k, score_function=score_function)


@pytest.mark.gpu
def test_in_a_cuda_graph(backend):
    logits = torch.randn(4096, 48)
    run(backend, logits, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fields(ops.router_topk(logits, 5, backend=backend))
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    for name, tensor in fields(ops.router_topk(logits, 5, backend=backend)).items():
        assert torch.equal(captured[name], tensor), name
