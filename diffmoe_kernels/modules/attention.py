"""Attention with rotary embedding as a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend, check_backend
from diffmoe_kernels.checks import check_choice, check_floating, check_shape, check_sizes
from diffmoe_kernels.modules.buffers import reset_tables_after_load
from diffmoe_kernels.modules.linear import Linear, side_by_side
from diffmoe_kernels.ops.rope_attention import QK_NORMS, check_rope
from diffmoe_kernels.ops.rope_attention.tables import grid_of


class RoPEAttention(nn.Module):
    """Bidirectional multi-head attention with rotary embedding (`ops.rope_attention`).

    Keys are the official code's: ``qkv``, ``proj``, with norm ``q_norm`` and ``k_norm``; with fewer kv heads
    ``q_proj``, ``k_proj``, ``v_proj`` in place of ``qkv``.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: channels of a head; hidden_size / num_heads where None.
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads where None.
        qkv_bias: whether the input projections have biases; the output projection always has one.
        qk_norm: "layernorm" (eps 1e-5) or "rmsnorm" (eps 1e-6) of each head's q and k, with learnable scale; or None.
        rope: "1d", "2d", "2d_interleaved" or None; see `ops.rope_attention`.
        grid_size: the token grid without prefix tokens, (rows, columns) or the side of a square; one int is the number
            of tokens for "1d". Where None it is read off each input, and the tables made at every call: N tokens for
            "1d", a square for the others.
        num_prefix_tokens: leading tokens that are not rotated.
        backend: any but "cuda"; see `diffmoe_kernels.backend`.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: sizes that do not fit each other, unknown names.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        qk_norm: str | None = None,
        rope: str | None = "2d",
        grid_size: int | tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, hidden_size=hidden_size, num_heads=num_heads)
        if head_dim is not None:
            check_sizes(1, head_dim=head_dim)
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads: expected a divisor of hidden_size = {hidden_size}, got {num_heads}")
            head_dim = hidden_size // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(1, num_kv_heads=num_kv_heads)
        check_sizes(0, num_prefix_tokens=num_prefix_tokens)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if rope is not None:
            check_rope(rope, head_dim)
        if qk_norm is not None:
            check_choice("qk_norm", qk_norm, QK_NORMS)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.rope = rope
        self.grid_size = None if grid_size is None else grid_of(rope, grid_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.backend = check_backend(backend)

        factory = {"device": device, "dtype": dtype}
        if num_kv_heads == num_heads:
            self.qkv = Linear(hidden_size, 3 * num_heads * head_dim, bias=qkv_bias, **factory)
        else:
            self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=qkv_bias, **factory)
            self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias, **factory)
            self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias, **factory)
        norms = {"layernorm": lambda: nn.LayerNorm(head_dim, eps=1e-5, **factory)}
        norms["rmsnorm"] = lambda: nn.RMSNorm(head_dim, eps=1e-6, **factory)
        self.q_norm = norms[qk_norm]() if qk_norm else None
        self.k_norm = norms[qk_norm]() if qk_norm else None
        self.proj = Linear(num_heads * head_dim, hidden_size, **factory)
        for table in ("_cos", "_sin", "_cos_float16", "_sin_float16"):
            self.register_buffer(table, None, persistent=False)
        self.reset_tables()
        self.register_load_state_dict_post_hook(reset_tables_after_load)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Raises:
            TypeError: x is no floating tensor.
            ValueError: another last dimension than D, or a number of tokens that is not the grid's.
        """
        check_floating("x", x)
        check_shape("x", x, "B", "N", self.hidden_size)
        cos, sin = self._tables(x)
        norms = {}
        if self.qk_norm is not None:
            for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
                norms |= {f"{name}_weight": norm.weight, f"{name}_bias": getattr(norm, "bias", None)}
            norms["norm_eps"] = self.q_norm.eps
        out = ops.rope_attention(
            self._packed_qkv(x),
            cos,
            sin,
            rope=self.rope,
            num_kv_heads=self.num_kv_heads,
            num_prefix_tokens=self.num_prefix_tokens,
            qk_norm=self.qk_norm,
            float16_tables=self._float16_tables(),
            backend=self.backend,
            **norms,
        )
        return self.proj(out)

    def _packed_qkv(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, H + 2 Hkv, d)."""
        if self.num_kv_heads == self.num_heads:
            packed = self.qkv(x)
        else:
            packed = side_by_side(x, self.q_proj, self.k_proj, self.v_proj)
        return packed.unflatten(-1, (-1, self.head_dim))

    def _tables(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.rope is None:
            return None, None
        num_rotated = x.shape[1] - self.num_prefix_tokens
        if self.grid_size is not None:
            if num_rotated != math.prod(self.grid_size):
                raise ValueError(
                    f"x: expected {math.prod(self.grid_size)} tokens for grid_size {self.grid_size} after "
                    f"{self.num_prefix_tokens} prefix tokens, got {num_rotated}"
                )
            return self._cos, self._sin
        if num_rotated < 0:
            raise ValueError(f"x: expected at least the {self.num_prefix_tokens} prefix tokens, got {x.shape[1]}")
        if self.rope == "1d":
            return ops.rope_table(self.rope, self.head_dim, num_rotated, device=x.device)
        side = round(num_rotated**0.5)  # Dynamo traces this, unlike math.isqrt
        if side * side != num_rotated:
            raise ValueError(
                f"x: expected a square number of tokens for rope {self.rope!r}, got {num_rotated}; set grid_size"
            )
        return ops.rope_table(self.rope, self.head_dim, side, device=x.device)

    def _float16_tables(self) -> tuple[Tensor, Tensor] | None:
        """Those of a known grid, unless a tool that casts a module's buffers found them."""
        tables = self._cos_float16, self._sin_float16
        return tables if all(one is not None and one.dtype == torch.float16 for one in tables) else None

    def reset_parameters(self) -> None:
        """Computes the rotary tables anew where they lie; its submodules have their own."""
        self.reset_tables(None if self._cos is None else self._cos.device)

    def reset_tables(self, device: torch.device | None = None) -> None:
        """Computes the rotary tables anew, on the device of the parameters where None is given."""
        if self.rope is None or self.grid_size is None:
            return
        with torch.inference_mode(False):  # training may follow
            device = self.proj.weight.device if device is None else device
            self._cos, self._sin = ops.rope_table(self.rope, self.head_dim, self.grid_size, device=device)
            self._cos_float16, self._sin_float16 = self._cos.half(), self._sin.half()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.reset_parameters()  # a cast would round the tables, to_empty leave them uninitialised
        return self

    def extra_repr(self) -> str:
        kv = f", num_kv_heads={self.num_kv_heads}" if self.num_kv_heads != self.num_heads else ""
        return f"num_heads={self.num_heads}{kv}, head_dim={self.head_dim}, rope={self.rope}, qk_norm={self.qk_norm}"
