"""Matrix products whose groups have sizes known only on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.backend import Backend, Implementation, run
from diffmoe_kernels.checks import check_floating, check_integer, check_same_device, check_shape, compute_dtype
from diffmoe_kernels.measured import experts_class, fastest
from diffmoe_kernels.ops.grouped_gemm import _torch
from diffmoe_kernels.ops.grouped_gemm._traced import traceable_reference
from diffmoe_kernels.triton_support import HAS_TRITON


def grouped_gemm(
    x: Tensor, w: Tensor, offs: Tensor | None = None, *, bias: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Grouped matrix product with the semantics of ``torch.nn.functional.grouped_mm``, and a bias.

    E groups; ``offs[e]`` is the inclusive end of group e on the dimension that is divided (R below):

    ========================  ==============  ===========  ===================================
    x                         w               result       use
    ========================  ==============  ===========  ===================================
    (R, K)                    (E, K, N)       (R, N)       experts forward, input gradient
    (M, R)                    (R, N)          (E, M, N)    weight gradient
    (E, M, K)                 (K, R)          (M, R)       groups on the columns
    (E, M, K), no ``offs``    (E, K, N)       (E, M, N)    equal groups
    ========================  ==============  ===========  ===================================

    Args:
        x, w: floating. x's dtype, or autocast's, is that of the product; w is cast to it, as a float32 master is.
        offs: (E,) int32, ascending; what lies past ``offs[-1]`` is not read, and 0 in the result.
        bias: (E, N) floating, with (R, K) x (E, K, N) only.
        backend: "reference", "torch" (grouped_mm), "triton" or "auto".

    Returns:
        The result's shape of the table, in the product's dtype.

    Raises:
        TypeError: operands that are not floating, or offs that are not int32.
        ValueError: shapes or devices that do not fit.
    """
    check_floating("x", x)
    check_floating("w", w)
    if x.dim() not in (2, 3) or w.dim() not in (2, 3):
        raise ValueError(f"x and w: expected 2 or 3 dimensions each, got {tuple(x.shape)} and {tuple(w.shape)}")
    inner_x, inner_w = x.shape[-1], w.shape[-2]
    if inner_x != inner_w:
        raise ValueError(f"w: expected {inner_x} rows to match x {tuple(x.shape)}, got {tuple(w.shape)}")
    if x.dim() == w.dim() == 3:
        if offs is not None:
            raise ValueError("offs: expected None for two operands of 3 dimensions, whose groups are equal")
        check_shape("w", w, x.shape[0], *w.shape[1:])
    else:
        _check_offs(x, w, offs)
    if bias is not None and (x.dim(), w.dim()) != (2, 3):
        raise ValueError("bias: expected None unless x is (R, K) and w is (E, K, N)")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, w.shape[0], w.shape[2])
    check_same_device(x=x, w=w, offs=offs, bias=bias)
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return run("grouped_gemm", backend, _IMPLEMENTATIONS, x.to(dtype), w.to(dtype), offs, bias)


def _check_offs(x: Tensor, w: Tensor, offs: Tensor | None) -> None:
    if offs is None:
        raise ValueError(f"offs: expected (E,) group ends for x {tuple(x.shape)} and w {tuple(w.shape)}, got None")
    check_integer("offs", offs)
    if offs.dtype != torch.int32:
        raise TypeError(f"offs: expected torch.int32, got {offs.dtype}")
    num_groups = x.shape[0] if x.dim() == 3 else w.shape[0] if w.dim() == 3 else "E"
    check_shape("offs", offs, num_groups)
    if offs.shape[0] == 0:
        raise ValueError("offs: expected at least one group, got none")


def _shape_class(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> str:
    if offs is None:
        return "equal groups"
    num_rows = x.shape[0] if w.dim() == 3 else w.shape[1 if x.dim() == 3 else 0]
    training = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return experts_class(num_rows, offs.shape[0], min(x.shape[-1], w.shape[-1]), x.dtype, training)


def _grouped_mm_is_unsuitable(x: Tensor, *args: Tensor | None) -> bool:
    return _torch.syncs_with_host(x) or _torch.why_not(x, *args) is not None


_IMPLEMENTATIONS = {
    "torch": Implementation(_torch.grouped_gemm_torch, _torch.why_not),
    "reference": Implementation(traceable_reference),
}
if HAS_TRITON:
    from diffmoe_kernels.ops.grouped_gemm import _library

    _IMPLEMENTATIONS = {
        "triton": Implementation(
            _library.grouped_gemm_triton,
            _library.why_not,
            automatic=fastest("grouped_gemm", "triton", _shape_class, torch_is_unsuitable=_grouped_mm_is_unsuitable),
        ),
        **_IMPLEMENTATIONS,
    }
