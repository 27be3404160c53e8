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
    *("diffmoe_block_e4", "diffmoe_block_e4_shared1", "diffmoe_block_e8", "ec_block", "ec_block_shared"),
    *("model_dense_dit", "model_dsmoe_dit_rope2d", "model_dsmoe_dit_sincos", "rf_simple", "rf_dsmoe_train"),
)
# Of a whole model: the embedders, one dense and one MoE block with two of its experts, and the last layer.
MODEL_GRADS = re.compile(
    r"grad\.(input\.|[xy]_embedder|t_embedder\.mlp\.0|final_layer|blocks\.0\.|blocks\.1\.(attn|adaLN|norm|mlp\.(gate|shared))"
    r"|blocks\.1\.mlp\.experts\.(blocks\.)?[03]\.)"
)


def main(folder: Path) -> None:
    for name in CASES:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            whole_model = name.startswith(("model_", "rf_dsmoe"))
            kept = {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
                if not key.startswith("aux.")
                and not (whole_model and key.startswith("grad.") and not MODEL_GRADS.match(key))
            }
            save_file(kept, HERE / f"{name}.safetensors", metadata=file.metadata())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
