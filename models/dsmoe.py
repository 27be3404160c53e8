"""DSMoE (Efficient MoE diffusion transformers, github.com/yhlleo/EfficientMoE): the block, the model, its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from diffmoe_kernels import Balance, MoE, MoEAux, RoPEAttention
from diffmoe_kernels.checks import check_choice
from diffmoe_kernels.ops.adaln import NORMS
from models.dit import DIGITS, DiT, MixtureConfig, check_least
from models.layers import AdaLNModulation, Mlp, Stream


@dataclass(frozen=True, kw_only=True)
class DSMoEConfig(MixtureConfig):
    """A DiT whose MLPs are, in some blocks, DeepSeek-V3's mixture of experts.

    Attributes, beside those of `MixtureConfig`:
        top_k, moe_intermediate_size: of each MoE layer.
        num_groups, top_groups, scaling_factor: of its router.
        shared_expert: add an expert of the same width that sees every token; False (the ablation S0) adds the layer's
            input instead.
        num_dense_blocks: this many first blocks are dense whatever interleave says.
        rope: "1d" or "2d"; None for a sin-cos position table.
        norm: "layernorm", or "rmsnorm" with a learnable scale.
        num_kv_heads: key and value heads; num_heads where None.
        balance, capacity_factor: see `MoE`.
        masked_group_fill: 0.0 is the official code's, see `ops.router_topk`.
    """

    top_k: int = 2
    moe_intermediate_size: int = 768
    num_groups: int = 1
    top_groups: int = 1
    scaling_factor: float = 2.0
    shared_expert: bool = True
    num_dense_blocks: int = 0
    rope: str | None = "2d"
    norm: str = "layernorm"
    num_kv_heads: int | None = None
    balance: Balance | dict[str, float] | str | None = None
    capacity_factor: float | None = None
    masked_group_fill: float = -math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rope", self.rope, ("1d", "2d", None))
        check_choice("norm", self.norm, NORMS)
        check_least(self, 0, "num_dense_blocks")
        if self.swiglu:
            raise ValueError("swiglu: expected False, a DSMoE's dense blocks have a SiLU MLP, got True")

    def is_moe_block(self, index: int) -> bool:
        return index >= self.num_dense_blocks and super().is_moe_block(index)


class DSMoEBlock(nn.Module):
    """RoPE attention, and a SiLU MLP or a `MoE` layer, each behind adaLN-Zero."""

    def __init__(self, config: DSMoEConfig, use_moe: bool) -> None:
        super().__init__()
        self.backend = config.backend
        hidden_size = config.hidden_size
        norm = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
        self.norm = config.norm
        self.norm1, self.norm2 = (
            norm(hidden_size, eps=1e-6, elementwise_affine=config.norm == "rmsnorm") for _ in range(2)
        )
        self.attn = RoPEAttention(
            hidden_size,
            config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope=config.rope,
            grid_size=(config.grid_size, config.grid_size),
            backend=config.backend,
        )
        self.use_moe = use_moe
        self.adds_input = use_moe and not config.shared_expert
        if use_moe:
            self.mlp = MoE(
                hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.top_k,
                scaling_factor=config.scaling_factor,
                num_groups=config.num_groups,
                top_groups=config.top_groups,
                shared_intermediate_size=config.moe_intermediate_size if config.shared_expert else 0,
                capacity_factor=config.capacity_factor,
                balance=config.balance,
                backend=config.backend,
                masked_group_fill=config.masked_group_fill,
            )
        else:
            self.mlp = Mlp(hidden_size, int(hidden_size * config.mlp_ratio), "silu")
        self.adaLN_modulation = AdaLNModulation(hidden_size, 6)

    def forward(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, c: Tensor, return_aux: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, MoEAux | None]:
        """A `Stream`'s three, (B, D) -> those of the next, and the MoE layer's record where asked for."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        options = {"norm": self.norm, "backend": self.backend}
        x, h = Stream(x, y, gate).modulated(shift_attn, scale_attn, weight=self.norm1.weight, **options)
        stream = Stream(x, self.attn(h), gate_attn)
        x, h = stream.modulated(shift_mlp, scale_mlp, weight=self.norm2.weight, exact=self.use_moe, **options)
        y, aux = self._mlp(h, return_aux)
        return x, y, gate_mlp, aux

    def _mlp(self, h: Tensor, return_aux: bool) -> tuple[Tensor, MoEAux | None]:
        if not self.use_moe:
            return self.mlp(h), None
        residual = h if self.adds_input else None
        return self.mlp(h, residual=residual, return_aux=True) if return_aux else (self.mlp(h, residual=residual), None)


class DSMoE(DiT):
    """DiT with token-choice experts: ``model(x, t, labels)``."""

    config: DSMoEConfig

    @property
    def mixes_samples(self) -> bool:
        return self.config.capacity_factor is not None  # places are given to the batch's tokens

    def has_position_table(self) -> bool:
        return self.config.rope is None

    def make_block(self, index: int) -> nn.Module:
        return DSMoEBlock(self.config, self.config.is_moe_block(index))


# Two routed experts of twice the hidden size, in fewer blocks.
_E16 = DSMoEConfig(num_experts=16, top_k=2, num_groups=2, top_groups=2, scaling_factor=2.0)
# Five routed experts out of many narrow ones.
_E48 = DSMoEConfig(num_experts=48, top_k=5, num_groups=1, top_groups=1, scaling_factor=2.5)

DSMOE_CONFIGS: dict[str, DSMoEConfig] = {
    "DSMoE-S-E16": replace(_E16, hidden_size=384, depth=10, num_heads=6, moe_intermediate_size=768),
    "DSMoE-B-E16": replace(_E16, hidden_size=768, depth=10, num_heads=12, moe_intermediate_size=1536),
    "DSMoE-L-E16": replace(_E16, hidden_size=1024, depth=20, num_heads=16, moe_intermediate_size=2048),
    "DSMoE-3B-E16": replace(_E16, hidden_size=1152, depth=30, num_heads=16, moe_intermediate_size=2880),
    "DSMoE-S-E48": replace(_E48, hidden_size=384, depth=12, num_heads=6, moe_intermediate_size=128),
    "DSMoE-B-E48": replace(_E48, hidden_size=768, depth=12, num_heads=12, moe_intermediate_size=256),
    "DSMoE-L-E48": replace(_E48, hidden_size=1024, depth=24, num_heads=16, moe_intermediate_size=448),
    "DSMoE-digits": DSMoEConfig(
        **DIGITS,
        num_experts=8,
        top_k=2,
        moe_intermediate_size=88,
        scaling_factor=2.0,
    ),
}
