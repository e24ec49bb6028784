"""optimum's ORTModelForCausalLM with transformers' generate, on a checkpoint that optimum exported.

The export is in fp32, or in dynamic int8 by optimum's ORTQuantizer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from worker_protocol import Emit, Generate, Request, serve, token_streamer

TASK = "text-generation-with-past"
# The post-processing fails for graphs of more than 2 GB, and only saves the memory of a tied matrix.
SETTINGS = {"task": TASK, "do_validation": False, "no_post_process": True}


def load(request: Request) -> Generate:
    import onnxruntime
    import torch
    import transformers
    from optimum.onnxruntime import ORTModelForCausalLM

    library: Any = transformers  # its type declarations are incomplete
    torch.set_num_threads(request.threads)
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = request.threads
    model = ORTModelForCausalLM.from_pretrained(
        request.models["target"], session_options=session, local_files_only=True
    )
    model.generation_config = library.GenerationConfig(eos_token_id=request.eos_ids, pad_token_id=0)

    def generate(prompt: list[int], limit: int, emit: Emit, _: int) -> None:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": limit, "streamer": token_streamer(emit)}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return generate


def make_form(form: dict[str, str]) -> None:
    """Export form["checkpoint"] to form["output"] in form["format"]."""
    from optimum.exporters.onnx import main_export

    output = Path(form["output"])
    if form["format"] == "fp32":
        main_export(form["checkpoint"], output, **SETTINGS)
    else:
        floats = output / "fp32"  # inside the output, so that it is removed with it even if this process is killed
        main_export(form["checkpoint"], floats, **SETTINGS)
        quantize(floats, output)
        shutil.rmtree(floats)


def quantize(floats: Path, output: Path) -> None:
    """Quantize to dynamic int8: weights per channel, activations per tensor, unsigned for VNNI instructions."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(floats, file_name="model.onnx")
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(quantization_config=config, save_dir=output, file_suffix=None)
    for path in floats.glob("*.json"):
        if not (output / path.name).exists():
            shutil.copyfile(path, output / path.name)


if __name__ == "__main__":
    serve(("optimum-onnx", "optimum", "transformers", "onnxruntime"), load, make_form)
