"""What answers say of speed and of drafts: the field `pard`, `timings` as llama.cpp's server has them, and `usage`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pard_onnx.runtime.result import Chunk, Result


class Progress:
    """The field `pard` of the chunks of one reply."""

    def __init__(self) -> None:
        self._tokens = self._rounds = self._committed = self._drafted = 0
        self._seconds = 0.0

    def add(self, chunk: Chunk) -> dict[str, Any]:
        """The field of this chunk: its tokens, its round, and the speed of the reply so far."""
        pieces = chunk.pieces
        accepted = [*chunk.drafted, *[False] * (len(pieces) - len(chunk.drafted))]  # text that was held back comes last
        out: dict[str, Any] = {"accepted": accepted, "pieces": list(pieces)}
        found = chunk.round
        if found is None:
            return out
        self._rounds += 1
        self._committed += found.accepted
        self._drafted += found.proposed
        self._seconds += found.draft_seconds + found.verify_seconds
        out["tokens_per_second"] = _rate(self._committed, self._seconds)
        out["mean_accepted"] = round(self._committed / self._rounds, 3)
        out["drafted"] = self._drafted
        out["round"] = {
            "draft_ms": _ms(found.draft_seconds),
            "verify_ms": _ms(found.verify_seconds),
            "proposed": found.proposed,
            "matched": found.matched,
            "source": found.source,
        }
        return out


def whole(result: Result) -> dict[str, Any]:
    """The field `pard` of a whole reply."""
    stats = result.stats
    return {
        "tokens_per_second": round(stats.tokens_per_second, 3),
        "mean_accepted": round(stats.mean_accepted, 3),
        "drafted": sum(stats.proposed),
        "matched": sum(stats.matched),
        "rounds": stats.rounds,
        "queued_ms": _ms(stats.queued),
        "time_to_first_token_ms": _ms(stats.time_to_first_token),
        "finish_reason": result.finish_reason,
        "seed": stats.seed,
        "exact": stats.exact,
    }


def timings(result: Result) -> dict[str, Any]:
    """The field that llama.cpp's server has."""
    stats = result.stats
    read, prefill = stats.prompt_tokens - stats.cached_tokens, stats.seconds.prefill
    decode = max(0.0, stats.seconds.total - stats.time_to_first_token)
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": read,
        "prompt_ms": _ms(prefill),
        "prompt_per_token_ms": _ms(prefill / read) if read else 0.0,
        "prompt_per_second": _rate(read, prefill),
        "predicted_n": stats.new_tokens,
        "predicted_ms": _ms(decode),
        "predicted_per_token_ms": _ms(decode / stats.new_tokens) if stats.new_tokens else 0.0,
        "predicted_per_second": _rate(stats.new_tokens, decode),
        "draft_n": sum(stats.proposed),
        "draft_n_accepted": sum(stats.matched),
    }


def usage(prompts: Sequence[Result], texts: Sequence[Result]) -> dict[str, Any]:
    """Tokens that were read and written. prompts: one result of each prompt; texts: all results."""
    read = sum(one.stats.prompt_tokens for one in prompts)
    written = sum(one.stats.new_tokens for one in texts)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.stats.cached_tokens for one in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(amount: int, seconds: float) -> float:
    return round(amount / seconds, 3) if seconds > 0 else 0.0
