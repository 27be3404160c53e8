"""Numbers as integers that order as `torch.sort` has them, for the Triton kernels that choose."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below every number's key
HIGHEST = tl.constexpr(2**31 - 1)  # NaN's


@triton.jit
def order_key(values):
    """Floats -> int32 keys: both zeros alike, NaN above all."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, HIGHEST, key)


@triton.jit
def number_of(key):
    """The float32 of a key."""
    bits = tl.where(key < 0, LOWEST - tl.minimum(key, 0), key)
    return bits.to(tl.float32, bitcast=True)
