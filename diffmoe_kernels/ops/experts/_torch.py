"""`experts` on `torch.nn.functional.grouped_mm`, without a host sync where that has a fast path.

Where Triton's kernels run they gather, activate and combine, as one operator that keeps what the kernels of
`_triton.py` keep; elsewhere PyTorch does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffmoe_kernels.ops.experts.reference import experts_reference
from diffmoe_kernels.ops.grouped_gemm._torch import multiply_rows, why_not_sizes, why_not_traced
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.triton_support import HAS_TRITON


def experts_torch(x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, **options: Any) -> Tensor:
    if takes_kernels(x, routing, up_proj, down_proj, **options):
        from diffmoe_kernels.ops.experts._library import experts_on_kernels

        return experts_on_kernels(x, routing, up_proj, down_proj, products="grouped_mm", **options)
    return experts_reference(x, routing, up_proj, down_proj, gemm=multiply_rows, **options)


def takes_kernels(x: Tensor, *args: Any, **options: Any) -> bool:
    """Whether the kernels between the products can run."""
    if not HAS_TRITON or not x.is_cuda:
        return False
    from diffmoe_kernels.ops.experts import _library

    return _library.why_not(x, *args, **options) is None


def why_not(x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, **options: Any) -> str | None:
    traced = None if takes_kernels(x, routing, up_proj, down_proj, **options) else why_not_traced(x)
    return traced or why_not_sizes(x, routing.num_rows, *up_proj.shape[1:], *down_proj.shape[1:])
