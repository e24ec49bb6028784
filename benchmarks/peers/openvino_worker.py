"""OpenVINO GenAI's LLMPipeline: plain, with an autoregressive draft, or with prompt lookup."""

from __future__ import annotations

from typing import Any

from worker_protocol import Emit, Generate, Request, serve


def load(request: Request) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai as genai

    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, emit: Emit) -> None:
            super().__init__()
            self.emit = emit

        def write(self, tokens: Any) -> Any:
            self.emit(tokens if isinstance(tokens, list) else [tokens])
            return genai.StreamingStatus.RUNNING

        def end(self) -> None: ...

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": request.threads, "scheduler_config": scheduler(genai, request)}
    if request.mode == "speculative":
        settings["draft_model"] = genai.draft_model(
            request.models["draft"], "CPU", INFERENCE_NUM_THREADS=request.threads
        )
    if request.mode == "prompt-lookup":
        settings["prompt_lookup"] = True
    pipeline = genai.LLMPipeline(request.models["target"], "CPU", **settings)

    def generate(prompt: list[int], limit: int, emit: Emit, draft_length: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.apply_chat_template = limit, False, False
        config.stop_token_ids = set(request.eos_ids)
        if draft_length:
            config.num_assistant_tokens = draft_length
        if request.mode == "prompt-lookup":
            config.max_ngram_size = 3
        pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config, Streamer(emit))

    return generate


def scheduler(genai: Any, request: Request) -> Any:
    """A cache for one conversation, without reuse of earlier prompts, which the warm-up would make cheaper."""
    config = genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = max(256, request.longest)
    config.cache_size = 1  # GiB
    return config


def make_form(form: dict[str, str]) -> None:
    """Write OpenVINO's model files beside the GGUF file form["gguf"], as OpenVINO GenAI does when it reads one."""
    import openvino_genai

    openvino_genai.LLMPipeline(form["gguf"], "CPU", enable_save_ov_model=True)


if __name__ == "__main__":
    serve(("openvino-genai", "openvino"), load, make_form)
