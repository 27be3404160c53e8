"""Floating-point operations of a model by formula, to tell how much of a GPU a run uses.

Every matrix product counts: (M, K) times (K, N) is 2 M N K operations. Norms, activations, softmax, rotation,
modulation, residuals and the choice of experts hold none and are left out: they are bound by memory. With B images of N
tokens (JiT: N + context tokens from block ``context_start`` on), T = B N, width D, p^2 C channels of a patch in:

    patch embedding      T p^2 C D;                 JiT: T (p^2 C b + b D), b the bottleneck
    time embedding       B (256 D + D^2)
    each block
      modulation         B 6 D^2
      projections        T D (2 H + 2 Hkv) d        q and the output, k and v
      scores and values  2 B N^2 H d
      dense MLP          2 T D W;                   SwiGLU: 3 T D W
      router             T D E
      experts            2 R D I;                   SwiGLU: 3 R D I; R the rows that experts take, below
      shared expert      as a dense MLP of its width
      predictor          T (D^2 + D E)              DiffMoE
    final layer          B 2 D^2 + T D p^2 C_out

times 2. Only activated experts count: R = T K in token choice (at most the capacity, where there is one); in expert
choice E int(P / E capacity_factor) for each pool of P tokens, in training exactly, at inference what DiffMoE's
predictor aims at. The backward takes twice the forward, a product for each operand, but for products whose input has no
gradient: of images, of the times' sinusoids and of the predictor's detached tokens it takes the weights' alone. What a
kernel or activation checkpointing computes again does not count.
"""

from __future__ import annotations

from diffmoe_kernels.modules.feed_forward import expert_capacity
from models.diffmoe import DiffMoEConfig
from models.dit import DiTConfig
from models.dsmoe import DSMoEConfig
from models.ecdit import ECDiTConfig
from models.jitmoe import JiTConfig
from models.tcdit import TCDiTConfig

FREQUENCIES = 256  # of the time embedding


def model_flops(config: DiTConfig, batch: int = 1, *, training: bool = False) -> int:
    """Operations of one forward, or of forward and backward, of `batch` images.

    Args:
        config: of the model, such as ``create_model(name).config`` or ``models.CONFIGS[name]``.
        batch: images; expert choice rounds its capacity over them, all else is in proportion.
        training: count the backward too.

    Raises:
        ValueError: a negative batch, or one whose tokens give an expert less than one.
    """
    if batch < 0:
        raise ValueError(f"batch: expected 0 images or more, got {batch}")
    tokens, width = batch * config.grid_size**2, config.hidden_size
    patch = config.patch_size**2 * config.in_channels
    # Multiply-adds: of products whose input has no gradient, and of all others.
    first, others = batch * FREQUENCIES * width, batch * width * width
    if isinstance(config, JiTConfig):
        first += tokens * patch * config.bottleneck_size
        others += tokens * config.bottleneck_size * width
    else:
        first += tokens * patch * width
    for index in range(config.depth):
        prefix = config.num_prefix_tokens(index) if isinstance(config, JiTConfig) else 0
        seen = tokens + batch * prefix
        others += 6 * batch * width * width + _attention(config, batch, seen) + _mlp(config, index, batch, seen)
        if isinstance(config, DiffMoEConfig) and config.is_moe_block(index):
            first += seen * width * width
            others += seen * width * config.num_experts
    others += 2 * batch * width * width + tokens * width * patch * (2 if config.learn_sigma else 1)
    return 2 * (2 * first + 3 * others if training else first + others)


def _attention(config: DiTConfig, batch: int, tokens: int) -> int:
    """Multiply-adds of the projections, the scores and the values of one block."""
    head_dim = config.head_dim or config.hidden_size // config.num_heads
    num_kv_heads = getattr(config, "num_kv_heads", None) or config.num_heads
    projections = tokens * config.hidden_size * (2 * config.num_heads + 2 * num_kv_heads) * head_dim
    length = tokens // max(batch, 1)
    return projections + 2 * tokens * length * config.num_heads * head_dim


def _mlp(config: DiTConfig, index: int, batch: int, tokens: int) -> int:
    """Multiply-adds of one block's MLP, or of its router, its experts' rows and its shared expert."""
    width, dense = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    own = 3 if config.swiglu else 2  # products of the dense MLP, and of experts that are like it
    if not config.is_moe_block(index):
        if isinstance(config, JiTConfig):
            return 3 * tokens * width * int(dense * 2 / 3)
        return own * tokens * width * dense
    experts = config.num_experts
    if isinstance(config, DSMoEConfig | JiTConfig):
        rows = _bounded(tokens * config.top_k, experts, getattr(config, "capacity_factor", None))
        computed = 3 * (rows + tokens * config.shared_expert) * width * config.moe_intermediate_size
    elif isinstance(config, TCDiTConfig):
        computed = own * tokens * config.top_k * width * dense + 3 * tokens * width * width * config.num_shared_experts
    elif isinstance(config, ECDiTConfig):
        rows = batch * experts * expert_capacity(tokens // max(batch, 1), experts, config.capacity_factor)
        computed = own * rows * width * dense + 3 * tokens * width * width * config.num_shared_experts
    else:
        rows = experts * expert_capacity(tokens, experts, config.capacity_factor)
        computed = own * rows * width * dense + 2 * tokens * width * 8 * width * config.shared_expert
    return computed + tokens * width * experts


def _bounded(choices: int, experts: int, capacity_factor: float | None) -> int:
    """Of all choices those that the experts' capacity, if any, lets through at most."""
    if capacity_factor is None:
        return choices
    return min(choices, experts * expert_capacity(choices, experts, capacity_factor))
