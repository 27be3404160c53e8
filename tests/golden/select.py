"""``python -m tests.golden.select FOLDER``: takes from a full set of reference vectors what the tests here need.

Left out are ``aux.*`` (intermediates) and, in whole-model cases, all gradients but a few of each kind.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden.vectors import HERE

CASES = (
    *(f"attn_{kind}" for kind in ("1d_hd8", "1d_hd16", "2d_hd8", "2d_hd16", "2d_qknorm", "none_hd8", "none_hd16")),
    *("attn_gqa_1d", "attn_gqa_2d", "attn_gqa_none", "jit_attn", "jit_attn_incontext"),
    *(f"dsmoe_layer_{kind}" for kind in ("g1", "g2", "maskfill", "s0", "top1", "zero_bias")),
    *("jit_dsmoe_layer_g1", "jit_dsmoe_layer_g2", "jit_dsmoe_layer_s0", "components", "moemlp_tp2"),
    *("diffmoe_block_e4", "diffmoe_block_e4_shared1", "ec_block", "ec_block_shared"),
    *("model_dense_dit", "model_dsmoe_dit_rope2d", "model_dsmoe_dit_sincos", "model_diffmoe_dit", "model_ecdit"),
    "model_jit_moe",
    "jit_denoiser_simple",
    *(
        "model_tcdit",
        "rf_simple",
        "rf_capacity_loss",
        "rf_dsmoe_train",
        "rf_diffmoe_train",
        "tc_block",
        "tc_block_swiglu",
    ),
)
# Of a whole model: an embedder, the last layer, and of one MoE block the attention, the modulation, the router, the
# predictor, the shared expert and one routed expert. Of similar layers: the further backward passes of one.
MODEL_GRADS = re.compile(
    r"grad\.(input\.|x_embedder|t_embedder\.mlp\.0\.bias|final_layer\.linear|blocks\.0\.mlp\.fc1\.bias"
    r"|blocks\.1\.(attn\.qkv|adaLN_modulation\.1\.bias|norm|mlp\.(gate|shared|capacity))"
    r"|blocks\.1\.mlp\.experts\.(blocks\.)?3\.)"
)
# Of a training step on a whole model, whose backward pass the cases above check already.
TRAINING_GRADS = re.compile(r"grad\.(input\.|x_embedder|blocks\.1\.mlp\.(gate|capacity|experts\.(blocks\.)?3\.))")
LEFT_OUT = re.compile(r"(aux|tc_block\w*/grad_eval|diffmoe_block_e4_shared1/grad_(eval|bce))\.")


def is_kept(case: str, key: str) -> bool:
    if LEFT_OUT.match(key) or LEFT_OUT.match(f"{case}/{key}"):
        return False
    kept = MODEL_GRADS if case.startswith("model_") else TRAINING_GRADS
    whole_model = case.startswith(("model_", "rf_d"))
    return not (whole_model and key.startswith("grad.") and not kept.match(key))


def main(folder: Path) -> None:
    for name in CASES:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            kept = {key: file.get_tensor(key) for key in file.keys() if is_kept(name, key)}  # noqa: SIM118
            save_file(kept, HERE / f"{name}.safetensors", metadata=file.metadata())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
