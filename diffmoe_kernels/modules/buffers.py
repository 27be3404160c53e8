"""Buffers that a cast of their module leaves alone."""

from __future__ import annotations

from torch import Tensor, nn

from diffmoe_kernels.checks import at_least_float32


class Float32Buffers(nn.Module):
    """A module whose own buffers stay float32: in bfloat16 0.3 would not feel an update of 0.001."""

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype.itemsize < 4:
                setattr(self, name, at_least_float32(buffer).to(after.device))
        return self

    def assign_buffer(self, name: str, value: Tensor) -> None:
        """Gives a buffer a float32 value: in place, where a CUDA graph looks for it, unless it was loaded in half."""
        buffer = getattr(self, name)
        if buffer.dtype == value.dtype:
            buffer.copy_(value)
        else:
            setattr(self, name, value)
