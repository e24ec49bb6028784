"""transformers' generate: plain, assisted by the autoregressive draft, or by prompt lookup."""

from __future__ import annotations

from typing import Any

from worker_protocol import Emit, Generate, Request, serve


def load(request: Request) -> Generate:
    import torch
    import transformers
    from token_streamer import token_streamer

    library: Any = transformers  # it declares types, and leaves them out
    torch.set_num_threads(request.threads)
    dtype = getattr(torch, request.settings.get("format", "bfloat16"))

    def checkpoint(part: str) -> Any:
        model = library.AutoModelForCausalLM.from_pretrained(request.models[part], dtype=dtype, local_files_only=True)
        model.generation_config = library.GenerationConfig(eos_token_id=request.eos_ids, pad_token_id=0)
        return model.eval()

    model = checkpoint("target")
    options = how(request)
    if request.mode == "assisted":
        options["assistant_model"] = checkpoint("draft")
        options["assistant_model"].generation_config.update(**request.settings.get("assistant", {}))

    def generate(prompt: list[int], limit: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])
        streamer = token_streamer(emit)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=streamer, **options)

    return generate


def how(request: Request) -> dict[str, Any]:
    options: dict[str, Any] = {"do_sample": False}
    if request.mode == "prompt-lookup":
        options["prompt_lookup_num_tokens"] = request.settings.get("draft_length", 5)
    return options


if __name__ == "__main__":
    serve(("transformers", "torch"), load)
