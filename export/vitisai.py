"""`vitisai_config.json`: what the NPU's compiler is told (provider option `config_file`)."""

from __future__ import annotations

import json
from pathlib import Path

from pard_onnx.models.manifest import VITISAI_CONFIG

# Ryzen AI's documented defaults for float models, which it computes in bfloat16 ("Config File Options").
CONFIG = {
    "passes": [
        {"name": "init", "plugin": "vaip-pass_init"},
        {
            "name": "vaiml_partition",
            "plugin": "vaip-pass_vaiml_partition",
            "vaiml_config": {"optimize_level": 1, "preferred_data_storage": "auto"},
        },
    ],
    "target": "VAIML",
    "targets": [{"name": "VAIML", "pass": ["init", "vaiml_partition"]}],
}


def write_vitisai_config(folder: Path) -> None:
    (folder / VITISAI_CONFIG).write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8", newline="\n")
