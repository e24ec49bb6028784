"""transformers' generate: plain, assisted by the autoregressive draft, or by prompt lookup."""

from __future__ import annotations

from typing import Any

from worker_protocol import Emit, Generate, Request, serve, token_streamer


def load(request: Request) -> Generate:
    import torch
    import transformers

    library: Any = transformers  # its type declarations are incomplete
    torch.set_num_threads(request.threads)
    dtype = getattr(torch, request.format)

    def checkpoint(part: str) -> Any:
        model = library.AutoModelForCausalLM.from_pretrained(request.models[part], dtype=dtype, local_files_only=True)
        model.generation_config = library.GenerationConfig(eos_token_id=request.eos_ids, pad_token_id=0)
        return model.eval()

    model = checkpoint("target")
    assistant = checkpoint("draft") if request.mode == "assisted" else None

    def generate(prompt: list[int], limit: int, emit: Emit, draft_length: int) -> None:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": limit, "streamer": token_streamer(emit)}
        if assistant:
            assistant.generation_config.num_assistant_tokens = draft_length
            options["assistant_model"] = assistant
        elif draft_length:
            options["prompt_lookup_num_tokens"] = draft_length
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return generate


if __name__ == "__main__":
    serve(("transformers", "torch"), load)
