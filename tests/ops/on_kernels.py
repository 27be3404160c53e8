"""`ops.experts` by each of the ways to run on this project's kernels, on a CPU too."""

from __future__ import annotations

import sys
from unittest import mock

from torch import Tensor

from diffmoe_kernels import ops

ON_KERNELS = "torch on kernels"  # as "torch" runs on a GPU: our kernels between grouped_mm's products


def experts(*args: object, backend: str = "auto", **options: object) -> Tensor:
    implementation = sys.modules["diffmoe_kernels.ops.experts._torch"]
    with mock.patch.object(implementation, "takes_kernels", lambda *_, **__: backend == ON_KERNELS):
        return ops.experts(*args, backend="torch" if backend == ON_KERNELS else backend, **options)
