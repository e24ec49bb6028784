"""What `Pair.warm_up` runs: generations that take the steps which are slow the first time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pard_onnx.models.checks import DRAFT_LENGTH

from .engine import Engine
from .options import Options
from .sampling.settings import Sampling

WARM_UP_TEXT = "The quick brown fox doesn't jump; it's 12,345.67 metres away!"
NEW_TOKENS = DRAFT_LENGTH + 2  # the prompt's step gives one; a round of all drafts takes the rest


def warm_up_runs(engine: Engine) -> Iterator[tuple[Options, list[int]]]:
    """The options and the prompt of each generation: a chunk of prefill, then plain rounds; rounds with drafts.

    Ids that end a text are forbidden, so that there are rounds at all. The draft length is fixed: with "auto", what is
    learned of texts would be learned of this one. Nothing is run that the capacity has no room for.
    """
    chunk, room = engine.models[0].tuning.chunk, engine.capacity - NEW_TOKENS - 1
    eos = dict.fromkeys(engine.target_manifest.spec.vocabulary.eos_ids, float("-inf"))
    plain = engine.text.encode(WARM_UP_TEXT) or [0]
    if room < 1 or max(plain) >= engine.target_manifest.spec.vocabulary.size:
        plain = [0]
    size = max(1, min(chunk + 1, room))
    prompt = (plain * (size // len(plain) + 1))[:size]
    options = Options(max_new_tokens=NEW_TOKENS, draft_length=0, sampling=Sampling(logit_bias=eos))
    yield options, prompt
    if engine.draft_manifest:
        yield replace(options, draft_length=DRAFT_LENGTH), prompt[: max(1, size // 2)]
