"""JiT (arXiv:2511.13720) and JiTMoE (github.com/yhlleo/EfficientMoE): pixels in, clean pixels out, no autoencoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffmoe_kernels import Balance, MoE, MoEAux, RoPEAttention
from diffmoe_kernels.modules import FeedForward
from models.dit import DiT, DiTConfig, ModelAux, check_least
from models.layers import AdaLNModulation, BottleneckPatchEmbed, FinalLayer, LabelEmbedder, Stream, unpatchify


@dataclass(frozen=True, kw_only=True)
class JiTConfig(DiTConfig):
    """A pixel transformer; a mixture of experts in its odd blocks where num_experts is not 0.

    Attributes:
        bottleneck_size: channels between patch and token.
        num_context_tokens: class tokens put before the image's at block context_start; 0 for none.
        context_start: block that first sees them.
        num_experts, top_k, moe_intermediate_size, num_groups, top_groups, scaling_factor: of each mixture, whose
            experts are SwiGLU with biases; 0 experts make a dense JiT.
        shared_expert: add an expert of the same width that sees every token; False adds the layer's input instead.
        expert_dropout: on the experts' activation, in training.
        balance: see `MoE`; None as officially.
        masked_group_fill: 0.0 is the official code's, see `ops.router_topk`.
    """

    input_size: int = 256
    patch_size: int = 16
    in_channels: int = 3
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    learn_sigma: bool = False
    bottleneck_size: int = 128
    num_context_tokens: int = 32
    context_start: int = 8
    num_experts: int = 0
    top_k: int = 2
    moe_intermediate_size: int = 0
    num_groups: int = 1
    top_groups: int = 1
    scaling_factor: float = 2.5
    shared_expert: bool = True
    expert_dropout: float = 0.0
    balance: Balance | dict[str, float] | str | None = None
    masked_group_fill: float = float("-inf")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "num_experts", "num_context_tokens")
        check_least(self, 1, "bottleneck_size")
        if self.num_context_tokens and not 0 <= self.context_start < self.depth:
            raise ValueError(f"context_start: expected a block, 0 to {self.depth - 1}, got {self.context_start}")
        if self.learn_sigma or self.swiglu or self.head_dim is not None:
            raise ValueError("learn_sigma, swiglu, head_dim: JiT has none of these; leave them out")

    def is_moe_block(self, index: int) -> bool:
        return self.num_experts > 0 and index % 2 == 1

    def num_prefix_tokens(self, index: int) -> int:
        """How many class tokens stand before the image's in a block."""
        return self.num_context_tokens if index >= self.context_start else 0


class JiTBlock(nn.Module):
    """Attention with QK norm and interleaved RoPE, and a SwiGLU or a mixture, each behind a weighted RMSNorm."""

    def __init__(self, config: JiTConfig, index: int) -> None:
        super().__init__()
        self.backend = config.backend
        hidden_size = config.hidden_size
        self.norm1, self.norm2 = (nn.RMSNorm(hidden_size, eps=1e-6) for _ in range(2))
        self.attn = RoPEAttention(
            hidden_size,
            config.num_heads,
            qk_norm="rmsnorm",
            rope="2d_interleaved",
            grid_size=config.grid_size,
            num_prefix_tokens=config.num_prefix_tokens(index),
            backend=config.backend,
        )
        self.use_moe = config.is_moe_block(index)
        self.adds_input = self.use_moe and not config.shared_expert
        if self.use_moe:
            self.mlp = MoE(
                hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.top_k,
                bias=True,
                scaling_factor=config.scaling_factor,
                num_groups=config.num_groups,
                top_groups=config.top_groups,
                shared_intermediate_size=config.moe_intermediate_size if config.shared_expert else 0,
                balance=config.balance,
                dropout=config.expert_dropout,
                backend=config.backend,
                masked_group_fill=config.masked_group_fill,
            )
        else:
            width = int(int(hidden_size * config.mlp_ratio) * 2 / 3)
            self.mlp = FeedForward(hidden_size, width, bias=True)
        self.adaLN_modulation = AdaLNModulation(hidden_size, 6)

    def forward(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, c: Tensor, return_aux: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, MoEAux | None]:
        """A `Stream`'s three, (B, D) -> those of the next, and the mixture's record where there is one and it is asked
        for."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        options = {"norm": "rmsnorm", "backend": self.backend}
        x, h = Stream(x, y, gate).modulated(shift_attn, scale_attn, weight=self.norm1.weight, **options)
        stream = Stream(x, self.attn(h), gate_attn)
        x, h = stream.modulated(shift_mlp, scale_mlp, weight=self.norm2.weight, exact=self.use_moe, **options)
        aux = None
        if not self.use_moe:
            y = self.mlp(h)
        elif return_aux:
            y, aux = self.mlp(h, residual=h if self.adds_input else None, return_aux=True)
        else:
            y = self.mlp(h, residual=h if self.adds_input else None)
        return x, y, gate_mlp, aux


class JiT(DiT):
    """Just image transformer: ``model(x, t, labels)`` predicts the clean image, t = 1 being data."""

    config: JiTConfig

    def __init__(self, config: JiTConfig) -> None:
        super().__init__(config)
        self.in_context_posemb: nn.Parameter | None = None
        if config.num_context_tokens:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.num_context_tokens, config.hidden_size))
            nn.init.normal_(self.in_context_posemb, std=0.02)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "in_context_posemb", None) is not None:  # the constructor makes it last
            nn.init.normal_(self.in_context_posemb, std=0.02)

    def make_patch_embedder(self) -> nn.Module:
        config = self.config
        return BottleneckPatchEmbed(config.patch_size, config.in_channels, config.bottleneck_size, config.hidden_size)

    def make_label_embedder(self) -> LabelEmbedder:
        config = self.config
        return LabelEmbedder(config.num_classes, config.hidden_size, config.class_dropout_prob, has_null_label=True)

    def make_block(self, index: int) -> nn.Module:
        return JiTBlock(self.config, index)

    def make_final_layer(self) -> nn.Module:
        config = self.config
        return FinalLayer(config.hidden_size, config.patch_size, self.out_channels, "rmsnorm", config.backend)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, ModelAux]:
        """As `DiT.forward`: (B, C, H, W), (B,) times in [0, 1], (B,) labels -> (B, C, H, W)."""
        self._check(x, t, labels)
        label = self.y_embedder(labels)  # (B, D)
        c = self.t_embedder(t) + label
        stream, layers = Stream(self.x_embedder(x) + self.pos_embed), []  # (B, N, D)
        for index, block in enumerate(self.blocks):
            if self.in_context_posemb is not None and index == self.config.context_start:
                context = label.unsqueeze(1) + self.in_context_posemb
                stream = Stream(torch.cat([context, stream.added(self.config.backend)], dim=1))
            *stream, layer_aux = block(*stream, c, return_aux)
            stream = Stream(*stream)
            layers.append(layer_aux)
        if self.in_context_posemb is not None:
            stream = Stream(stream.added(self.config.backend)[:, self.config.num_context_tokens :])
        out = unpatchify(self.final_layer(stream, c), self.config.patch_size)
        return (out, ModelAux(tuple(layers))) if return_aux else out


_B = JiTConfig(hidden_size=768, depth=12, num_heads=12, context_start=4)
_L = JiTConfig(hidden_size=1024, depth=24, num_heads=16, context_start=8)
_E16 = {"num_experts": 16, "num_groups": 2, "top_groups": 2}

_DIGITS = JiTConfig(
    input_size=8,
    patch_size=2,
    in_channels=1,
    num_classes=10,
    hidden_size=96,
    depth=6,
    num_heads=6,
    bottleneck_size=16,
    num_context_tokens=4,
    context_start=2,
)

JIT_CONFIGS: dict[str, JiTConfig] = {
    "JiT-B/16": _B,
    "JiT-L/16": _L,
    "JiTMoE-B/16-E16": replace(_B, depth=10, moe_intermediate_size=1536, **_E16),
    "JiTMoE-L/16-E16": replace(_L, depth=20, moe_intermediate_size=2048, **_E16),
    "JiT-digits": _DIGITS,
    "JiTMoE-digits": replace(_DIGITS, num_experts=8, moe_intermediate_size=88),
}
