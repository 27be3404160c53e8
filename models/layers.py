"""Parts that every model shares: patch, timestep and label embedders, position table, MLP, final layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend
from diffmoe_kernels.checks import compute_dtype
from diffmoe_kernels.modules.buffers import reset_tables_after_load
from diffmoe_kernels.ops.experts.reference import activate


class PatchEmbed(nn.Module):
    """Images to tokens: a convolution whose stride is its size. Key: ``proj``."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), row-major."""
        return self.proj(x).flatten(2).mT.contiguous()  # else every token of the first blocks is in pieces


class BottleneckPatchEmbed(nn.Module):
    """Images to tokens through a narrow layer (JiT, arXiv:2511.13720). Keys: ``proj1``, ``proj2``."""

    def __init__(self, patch_size: int, in_channels: int, bottleneck_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck_size, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck_size, hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), row-major."""
        return self.proj2(self.proj1(x)).flatten(2).mT.contiguous()


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, N, patch_size^2 * C) tokens of a square image, channels innermost -> (B, C, H, W)."""
    side = round(x.shape[1] ** 0.5)
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time through an MLP. Keys: ``mlp.0``, ``mlp.2``."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(
            nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.register_buffer("frequencies", None, persistent=False)
        self.reset_tables()
        self.register_load_state_dict_post_hook(reset_tables_after_load)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) times, in [0, 1] for flow, 0 to 999 for DDPM -> (B, D)."""
        return self.mlp(timestep_embedding(t, self.frequencies).to(self.mlp[0].weight.dtype))

    def reset_tables(self) -> None:
        """Computes the frequencies anew, on the CPU whose rounding the official code has, for the weights' device."""
        with torch.inference_mode(False):  # training may follow
            self.frequencies = timestep_frequencies(self.num_frequencies).to(self.mlp[0].weight.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.reset_tables()  # a cast would round the table, to_empty leave it uninitialised
        return self


def timestep_frequencies(dim: int, max_period: float = 10000.0) -> Tensor:
    """(dim / 2,) float32 on the CPU, falling from 1 to 1 / max_period (GLIDE, arXiv:2112.10741).

    Float32 in the official order of operations: a time near 1000 turns a difference of 1e-7 here into one of 1e-4.
    """
    with torch.device("cpu"):
        exponents = -math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2)
        return torch.exp(exponents)


def timestep_embedding(t: Tensor, frequencies: Tensor) -> Tensor:
    """(B,) times, (F,) frequencies -> (B, 2F) float32, [cos | sin]."""
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LabelEmbedder(nn.Module):
    """Class labels to vectors; in training each label is dropped to the null label with ``dropout_prob``.

    Key: ``embedding_table``, of num_classes rows, and one for the null label where labels are dropped or
    ``has_null_label`` says so.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float, has_null_label: bool = False) -> None:
        super().__init__()
        has_null_label = has_null_label or dropout_prob > 0
        self.null_label = num_classes if has_null_label else None
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + has_null_label, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) integers -> (B, D)."""
        labels = labels.long()  # narrower ones may not hold the null label
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = labels.where(~dropped, self.null_label)
        return self.embedding_table(labels)


class Mlp(nn.Module):
    """Two linear layers with biases. Keys: ``fc1``, ``fc2``."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(activate(self.fc1(x), self.activation))


class Stream(NamedTuple):
    """The residual stream between blocks, ``x + gate * y``: left to the next norm, which adds in the same pass.

    Blocks take and return the three by themselves: reentrant activation checkpointing knows no tensors within others.
    What a forward hook of a block finds first is x, without the last branch: `Stream(*output[:3]).added(backend)`.

    Attributes:
        x: (B, N, D).
        y: (B, N, D), the last branch's output; None where nothing is left to add.
        gate: (B, D), its gate.
    """

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None

    def added(self, backend: Backend) -> Tensor:
        """(B, N, D)."""
        return self.x if self.y is None else ops.gated_residual(self.x, self.y, self.gate, backend=backend)

    def modulated(
        self,
        shift: Tensor,
        scale: Tensor,
        *,
        weight: Tensor | None = None,
        norm: str = "layernorm",
        exact: bool = False,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """The stream and its modulated norm (`ops.adaln`), (B, N, D) each.

        The norm is in the dtype that autocast would have a linear layer round it to; ``exact``: in the stream's, for
        a router.
        """
        dtype = self.x.dtype if exact else compute_dtype(self.x)
        options = {"weight": weight, "norm": norm, "dtype": dtype, "backend": backend}
        if self.y is None:
            return self.x, ops.adaln(self.x, shift, scale, **options)
        return ops.gated_residual_adaln(self.x, self.y, self.gate, shift, scale, **options)


class AdaLNModulation(nn.Sequential):
    """The condition to ``chunks`` vectors per sample. Key: ``1`` (the linear layer), zero at first (adaLN-Zero)."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))
        self.chunks = chunks

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> ``chunks`` tensors (B, D)."""
        return super().forward(c).chunk(self.chunks, dim=1)


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches. Keys: ``linear``, ``adaLN_modulation.1``, for JiT ``norm_final``."""

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        out_channels: int,
        norm: str = "layernorm",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.norm = norm
        self.backend = backend
        self.norm_final = nn.RMSNorm(hidden_size, eps=1e-6) if norm == "rmsnorm" else None
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = AdaLNModulation(hidden_size, 2)

    def forward(self, stream: Stream, c: Tensor) -> Tensor:
        """Of (B, N, D), (B, D) -> (B, N, patch_size^2 * out_channels)."""
        shift, scale = self.adaLN_modulation(c)
        weight = None if self.norm_final is None else self.norm_final.weight
        _, h = stream.modulated(shift, scale, weight=weight, norm=self.norm, backend=self.backend)
        return self.linear(h)


def sincos_table(hidden_size: int, side: int) -> Tensor:
    """(side^2, D) float32: sine and cosine position table of a square grid (MAE, arXiv:2111.06377).

    The first half of the channels encodes the column, the second the row, each [sin | cos]; float64 until the end.
    """
    position = torch.arange(side, dtype=torch.float64)
    quarter = hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(position, omega)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    return torch.cat([one_axis.repeat(side, 1), one_axis.repeat_interleave(side, dim=0)], dim=1).float()
