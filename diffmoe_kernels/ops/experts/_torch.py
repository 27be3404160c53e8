"""`experts` on `torch.nn.functional.grouped_mm`: no host sync."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from diffmoe_kernels.ops.experts.reference import experts_reference
from diffmoe_kernels.ops.grouped_gemm._torch import multiply_rows, why_not_sizes
from diffmoe_kernels.routing import Routing

experts_torch = partial(experts_reference, gemm=multiply_rows)


def why_not(x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, **_: object) -> str | None:
    return why_not_sizes(x, routing.num_rows, *up_proj.shape[1:], *down_proj.shape[1:])
