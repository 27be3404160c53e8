"""Buffers that are not what a cast or a state dict would make of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own buffers stay float32: in bfloat16 0.5 + 0.001 is still 0.5."""

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype.itemsize < 4:
                setattr(self, name, buffer.to(after.device, torch.float32))
        return self

    def assign_buffer(self, name: str, value: Tensor) -> None:
        """Sets a buffer: in place, so that captured CUDA graphs see it, unless it was loaded in half precision."""
        buffer = getattr(self, name)
        if buffer.dtype == value.dtype:
            buffer.copy_(value)
        else:
            setattr(self, name, value)


def reset_tables_after_load(module: nn.Module, _: object) -> None:
    """Hook for after `load_state_dict`: ``assign=True`` takes the weights off the meta device, and no table with them.

    Args:
        module: with tables as buffers that no state dict holds, and ``reset_tables()``, which makes them on the device
            of its weights.
    """
    on_meta = [one.is_meta for one in module.buffers(recurse=False)]
    if any(on_meta) and not any(parameter.is_meta for parameter in module.parameters()):
        module.reset_tables()
