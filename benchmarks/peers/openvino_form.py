"""OpenVINO's model files beside a GGUF file, written by OpenVINO GenAI itself as it reads the file."""

from __future__ import annotations

from typing import Any

from worker_protocol import Send, script


def make(request: dict[str, Any], send: Send) -> None:
    import openvino_genai

    openvino_genai.LLMPipeline(request["gguf"], "CPU", enable_save_ov_model=True)
    send(event="end")


if __name__ == "__main__":
    script(make)
