"""optimum's ORTModelForCausalLM under transformers' generate, on an export of optimum's own."""

from __future__ import annotations

from typing import Any

from worker_protocol import Emit, Generate, Request, serve


def load(request: Request) -> Generate:
    import onnxruntime
    import torch
    import transformers
    from optimum.onnxruntime import ORTModelForCausalLM
    from token_streamer import token_streamer

    library: Any = transformers  # it declares types, and leaves them out
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


if __name__ == "__main__":
    serve(("optimum-onnx", "optimum", "transformers", "onnxruntime"), load)
