"""Numbers as integers that order as `torch.sort` has them, for the Triton kernels that choose."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below every number's key
HIGHEST = tl.constexpr(2**31 - 1)  # NaN's


@triton.jit
def order_key(values):
    """Floats -> int32 keys: both zeros alike, NaN above all."""
    values = values.to(tl.float32)
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & HIGHEST), HIGHEST)


@triton.jit
def number_of(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & HIGHEST)).to(tl.float32, bitcast=True)
