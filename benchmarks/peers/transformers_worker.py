"""transformers' generate: plain, assisted by the autoregressive draft, or by prompt lookup."""

from __future__ import annotations

from typing import Any

from worker_protocol import Emit, Generate, Request, serve

OPTIONS: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}


def load(request: Request) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """Hands tokens on; the first that it is given are the prompt's."""

        def __init__(self, emit: Emit) -> None:
            self.emit, self.prompt_seen = emit, False

        def put(self, value: Any) -> None:
            if self.prompt_seen:
                self.emit(value.reshape(-1).tolist())
            self.prompt_seen = True

        def end(self) -> None: ...

    torch.set_num_threads(request.threads)
    dtype = getattr(torch, request.settings.get("dtype", "bfloat16"))

    def checkpoint(part: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(request.models[part], dtype=dtype, local_files_only=True)
        model.generation_config = GenerationConfig(eos_token_id=request.eos_ids, pad_token_id=request.eos_ids[0])
        return model.eval()

    model = checkpoint("target")
    options = OPTIONS | how(request)
    if request.mode == "assisted":
        options["assistant_model"] = checkpoint("draft")
        options["assistant_model"].generation_config.update(**request.settings.get("assistant", {}))

    def generate(prompt: list[int], limit: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=Streamer(emit), **options
        )

    return generate


def how(request: Request) -> dict[str, Any]:
    if request.mode == "prompt-lookup":
        return {"prompt_lookup_num_tokens": request.settings.get("draft_length", 5)}
    return {}


if __name__ == "__main__":
    serve(("transformers", "torch"), load)
