"""A checkpoint exported by optimum itself, in its own environment: fp32, or dynamic int8 by its ORTQuantizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from worker_protocol import Send, script

TASK = "text-generation-with-past"
# Its post-processing fails on graphs of more than 2 GB, and only saves the room of a tied matrix.
SETTINGS = {"task": TASK, "do_validation": False, "no_post_process": True}


def make(request: dict[str, Any], send: Send) -> None:
    from optimum.exporters.onnx import main_export

    output = Path(request["output"])
    if request["format"] == "fp32":
        main_export(request["checkpoint"], output, **SETTINGS)
    else:
        whole = output / "fp32"  # inside, so that whoever asked removes it even if this process is killed
        main_export(request["checkpoint"], whole, **SETTINGS)
        quantize(whole, output)
        shutil.rmtree(whole)
    send(event="end")


def quantize(whole: Path, output: Path) -> None:
    """Dynamic int8: weights per channel, activations as they come, unsigned as VNNI wants them."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(whole, file_name="model.onnx")
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(quantization_config=config, save_dir=output, file_suffix=None)
    for path in whole.glob("*.json"):
        if not (output / path.name).exists():
            shutil.copyfile(path, output / path.name)


if __name__ == "__main__":
    script(make)
