"""Tokens of transformers' generate as they come; for the workers that run under it."""

from __future__ import annotations

from typing import Any

from worker_protocol import Emit


def token_streamer(emit: Emit) -> Any:
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """The first tokens that it is given are the prompt's."""

        def __init__(self) -> None:
            self.prompt_seen = False

        def put(self, value: Any) -> None:
            if self.prompt_seen:
                emit(value.reshape(-1).tolist())
            self.prompt_seen = True

        def end(self) -> None: ...

    return Streamer()
