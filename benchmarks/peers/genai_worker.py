"""onnxruntime-genai: plain, with its own speculative decoding by a draft model, or with its n-gram lookup.

Models are exported folders: an export with the role of a target has the genai_config.json that genai reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from worker_protocol import Emit, Generate, Request, serve


def load(request: Request) -> Generate:
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(request.models["target"])
    config.overlay(json.dumps(overlay(request)))
    model = genai.Model(config)

    def generate(prompt: list[int], limit: int, emit: Emit, draft_length: int) -> None:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + limit, do_sample=False)
        if draft_length:
            parameters.set_speculative_options(max_draft_tokens=draft_length, **request.settings)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            emit(generator.get_next_tokens())

    return generate


def overlay(request: Request) -> dict[str, Any]:
    """The entries of genai_config.json that the request changes: threads, the ids that end a text, and the draft."""
    session = {"intra_op_num_threads": request.threads}
    model: dict[str, Any] = {"decoder": {"session_options": session}, "eos_token_id": request.eos_ids}
    if request.mode == "speculative":
        folder = Path(request.models["draft"])
        draft = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        draft["filename"] = os.path.relpath(folder / draft["filename"], request.models["target"])
        draft["session_options"] |= session
        model["draft"] = draft
    return {"model": model}


if __name__ == "__main__":
    serve(("onnxruntime-genai",), load)
