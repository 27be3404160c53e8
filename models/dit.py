"""Dense DiT (arXiv:2212.09748): the block, the model, its sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from diffmoe_kernels import ExpertChoiceAux, ExpertChoiceMoE, MoE, MoEAux, RoPEAttention
from diffmoe_kernels.backend import Backend
from diffmoe_kernels.checks import as_records, check_floating, check_integer, check_shape, check_tensor
from diffmoe_kernels.modules import ExpertChoiceRouter, Experts, FeedForward, TopKRouter
from diffmoe_kernels.routing import register_record
from models.layers import (
    AdaLNModulation,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    Stream,
    TimestepEmbedder,
    sincos_table,
    unpatchify,
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """What a dense DiT is made of. The names are the official constructor's, where that has the field.

    Attributes:
        input_size: side of the square input, in pixels or latent cells.
        patch_size: side of a patch.
        in_channels: channels of the input.
        hidden_size: D.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: channels of a head; hidden_size / num_heads where None.
        mlp_ratio: width of the dense MLP over D.
        swiglu: a SwiGLU without biases in place of the dense MLP with GELU (not for DSMoE).
        class_dropout_prob: how often a label is dropped in training; 0 leaves the model without a null label.
        num_classes: labels are 0 .. num_classes - 1; the null label is num_classes.
        learn_sigma: twice the output channels; flow uses the first half.
        backend: see `diffmoe_kernels.backend`.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    swiglu: bool = False
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        _check_types(self)
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
        check_least(self, 1, *sizes)
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size: expected a multiple of patch_size = {self.patch_size}, got {self.input_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, got {self.hidden_size}")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob: expected a probability in [0, 1), got {self.class_dropout_prob}")
        if self.hidden_size * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio: expected an MLP of at least one channel, got {self.mlp_ratio}")

    @property
    def grid_size(self) -> int:
        return self.input_size // self.patch_size

    def is_moe_block(self, index: int) -> bool:
        """Whether that block has a mixture of experts in the place of an MLP."""
        return False


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(DiTConfig):
    """A DiT whose MLPs are, in some blocks, mixtures of experts.

    Attributes:
        num_experts: of each mixture.
        interleave: mixtures in odd blocks only, else in all.
    """

    num_experts: int = 16
    interleave: bool = True

    def is_moe_block(self, index: int) -> bool:
        return index % 2 == 1 or not self.interleave


_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _check_types(config: DiTConfig) -> None:
    """Configurations come from YAML and command lines too: a wrong type is named, not met later as a bare error."""
    for field in fields(config):
        value, (kind, *rest) = getattr(config, field.name), str(field.type).split(" | ")
        if kind not in _TYPES or (value is None and "None" in rest):
            continue
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise TypeError(f"{field.name}: expected {field.type}, got {value!r}")
        # What masks may be lower than every number.
        if isinstance(value, float) and not math.isfinite(value) and not value == field.default == -math.inf:
            raise ValueError(f"{field.name}: expected a finite number, got {value}")


def check_least(config: DiTConfig, least: int, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: expected {least} or more, got {getattr(config, name)}")


@dataclass(frozen=True, eq=False)
class ModelAux:
    """What one forward tells about its MoE layers.

    Attributes:
        layers: one record per block; None for a dense block.
        loss_weight: of the layers' losses in the sum.
    """

    layers: tuple[MoEAux | ExpertChoiceAux | None, ...]
    loss_weight: float = 1.0

    @property
    def loss(self) -> Tensor | None:
        """() float32: the weighted sum of the layers' auxiliary losses, or None where there are none."""
        losses = [layer.loss for layer in self.layers if layer is not None and layer.loss is not None]
        return self.loss_weight * torch.stack(losses).sum() if losses else None


register_record(ModelAux)


class DiTBlock(nn.Module):
    """Attention, and an MLP or a mixture of experts, each behind adaLN-Zero."""

    def __init__(self, config: DiTConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.backend = config.backend
        self.attn = RoPEAttention(
            config.hidden_size, config.num_heads, head_dim=config.head_dim, rope=None, backend=config.backend
        )
        self.mlp = mlp
        self.use_moe = isinstance(mlp, MoE | ExpertChoiceMoE)  # it may be wrapped later
        self.adaLN_modulation = AdaLNModulation(config.hidden_size, 6)

    def forward(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, c: Tensor, return_aux: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, MoEAux | ExpertChoiceAux | None]:
        """A `Stream`'s three, (B, D) -> those of the next, and the mixture's record where there is one and it is asked
        for."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x, h = Stream(x, y, gate).modulated(shift_attn, scale_attn, backend=self.backend)
        stream = Stream(x, self.attn(h), gate_attn)
        x, h = stream.modulated(shift_mlp, scale_mlp, exact=self.use_moe, backend=self.backend)
        y, aux = self.mlp(h, return_aux=True) if return_aux and self.use_moe else (self.mlp(h), None)
        return x, y, gate_mlp, aux


def dense_mlp(config: DiTConfig) -> nn.Module:
    """DiT's MLP, or a SwiGLU without biases of the same width."""
    width = int(config.hidden_size * config.mlp_ratio)
    return FeedForward(config.hidden_size, width) if config.swiglu else Mlp(config.hidden_size, width, "gelu_tanh")


class DiT(nn.Module):
    """Diffusion transformer: ``model(x, t, labels)``. Its state dict is the official one."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.input_size = config.input_size
        self.num_classes = config.num_classes
        self.x_embedder = self.make_patch_embedder()
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = self.make_label_embedder()
        self.pos_embed: nn.Parameter | None = None
        if self.has_position_table():
            table = torch.empty(1, config.grid_size**2, config.hidden_size)
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(self.make_block(index) for index in range(config.depth))
        self.final_layer = self.make_final_layer()
        self.reset_parameters()

    aux_loss_weight = 1.0
    mixes_samples = False  # whether a sample's result depends on the others of its batch

    def has_position_table(self) -> bool:
        return True

    def make_patch_embedder(self) -> nn.Module:
        return PatchEmbed(self.config.patch_size, self.config.in_channels, self.config.hidden_size)

    def make_label_embedder(self) -> LabelEmbedder:
        config = self.config
        return LabelEmbedder(config.num_classes, config.hidden_size, config.class_dropout_prob)

    def make_block(self, index: int) -> nn.Module:
        mixes = self.config.is_moe_block(index)
        return DiTBlock(self.config, self.make_mixture() if mixes else dense_mlp(self.config))

    def make_mixture(self) -> nn.Module:
        """The MLP of a `DiTBlock` with a mixture of experts, in the families that have such blocks."""
        raise NotImplementedError(f"{type(self).__name__} has no mixture of experts")

    def make_final_layer(self) -> nn.Module:
        config = self.config
        return FinalLayer(config.hidden_size, config.patch_size, self.out_channels, backend=config.backend)

    @property
    def null_label(self) -> int | None:
        """The label of unconditional sampling, or None where the model was built without label dropout."""
        return self.y_embedder.null_label

    def reset_parameters(self) -> None:
        """Official initialisation: Xavier-uniform matrices, zero biases, zero modulation and output (adaLN-Zero).

        Of all that a state dict holds, so that a model on the meta device may go elsewhere by `to_empty`, which makes
        the rotary tables, and this.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TopKRouter | ExpertChoiceRouter | ExpertChoiceMoE | nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, FeedForward | Experts):
                _xavier_experts_(module)
        for layer in self.x_embedder.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_table(self.config.hidden_size, self.config.grid_size))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, ModelAux]:
        """Predicts from a noised input.

        Args:
            x: (B, in_channels, input_size, input_size) floating.
            t: (B,) times, in [0, 1] for flow, 0 to 999 for DDPM.
            labels: (B,) integers; in training some are dropped to the null label.
            return_aux: return (out, `ModelAux`) instead of out.

        Returns:
            (B, out_channels, input_size, input_size).

        Raises:
            TypeError: x that is not floating or labels that are not integers.
            ValueError: shapes that do not fit, an empty batch. Values are not checked, so that the GPU is not stopped.
        """
        self._check(x, t, labels)
        x = self.x_embedder(x)  # (B, N, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(labels)  # (B, D)
        stream, layers = Stream(x), []
        for block in self.blocks:
            *stream, layer_aux = block(*stream, c, return_aux)
            stream = Stream(*stream)
            layers.append(layer_aux)
        out = unpatchify(self.final_layer(stream, c), self.config.patch_size)
        return (out, ModelAux(tuple(layers), self.aux_loss_weight)) if return_aux else out

    def forward_with_cfg(self, x: Tensor, t: Tensor, labels: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance as the official code does it.

        Args:
            x: (2B, C, H, W); both halves are computed from the first.
            t: (2B,).
            labels: (2B,), the conditions, then the null label.
            cfg_scale: 1 is no guidance.

        Returns:
            (2B, out_channels, H, W), both halves alike; the first three channels are guided, the others are not.
        """
        if x.shape[0] % 2:
            raise ValueError(f"x: expected an even batch, conditional and unconditional halves, got {x.shape[0]}")
        half = x[: x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, labels)
        conditional, unconditional = out[:, :3].chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)

    def update_routing_state(self, aux: ModelAux | Sequence[ModelAux]) -> None:
        """Hands each MoE layer its records (`MoE.update_routing_state`); once per optimizer step.

        Args:
            aux: the record of the step's forward, or those of its micro-batches.

        Raises:
            TypeError: another object than a `ModelAux` or a sequence of them.
            ValueError: no record at all, or one of a model of another shape.
        """
        records = as_records(aux, ModelAux)
        for record in records:
            if len(record.layers) != len(self.blocks):
                raise ValueError(f"aux: expected records of {len(self.blocks)} blocks, got {len(record.layers)}")
        for index, block in enumerate(self.blocks):
            layer_records = [record.layers[index] for record in records]
            if layer_records[0] is not None:
                block.mlp.update_routing_state(layer_records)

    def _check(self, x: Tensor, t: Tensor, labels: Tensor) -> None:
        check_floating("x", x)
        check_shape("x", x, "B", self.in_channels, self.input_size, self.input_size)
        if x.shape[0] == 0:
            raise ValueError("x: expected at least one sample, got an empty batch")
        check_tensor("t", t)
        check_shape("t", t, x.shape[0])
        check_integer("labels", labels)
        check_shape("labels", labels, x.shape[0])


def _xavier_experts_(module: FeedForward | Experts) -> None:
    """Xavier-uniform for each matrix by itself: the experts lie in one tensor, and so do gate and up.

    Where these have biases they are JiT's, one matrix officially too.
    """
    parameters = dict(module.named_parameters())
    has_bias = any(name.endswith("bias") for name in parameters)
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            rows, columns = parameter.shape[-2:]
            is_pair = name.startswith("gate_up_proj") and not has_bias
            bound = math.sqrt(6 / ((rows // 2 if is_pair else rows) + columns))
            nn.init.uniform_(parameter, -bound, bound)


# Scikit-learn's digits: 16 tokens, about a million parameters.
DIGITS = {"hidden_size": 96, "depth": 6, "num_heads": 6}
DIGITS |= {"input_size": 8, "in_channels": 1, "num_classes": 10, "learn_sigma": False}

DIT_CONFIGS: dict[str, DiTConfig] = {
    "DiT-S/2": DiTConfig(hidden_size=384, depth=12, num_heads=6),
    "DiT-B/2": DiTConfig(hidden_size=768, depth=12, num_heads=12),
    "DiT-L/2": DiTConfig(hidden_size=1024, depth=24, num_heads=16),
    "DiT-XL/2": DiTConfig(hidden_size=1152, depth=28, num_heads=16),
    "DiT-digits": DiTConfig(**DIGITS),
}
