"""llama.cpp through llama-cpp-python's plain bindings: plain, with an autoregressive draft, or with prompt lookup.

The loop is that of llama.cpp's own speculative examples: the draft stops before a token of low probability, and the
target verifies all proposals in one step. llama_cpp.Llama.generate would do so too, but it copies every row of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker_protocol import Emit, Generate, Request, serve

Propose = Callable[[list[int], int], list[int]]  # (all tokens so far, most proposals) -> proposals


class Model:
    """A GGUF model with its KV cache; `cached`: the tokens in the cache."""

    def __init__(self, path: str, threads: int, length: int) -> None:
        import llama_cpp
        import numpy as np

        self.np, self.lib = np, llama_cpp
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = length
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {length} tokens for {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(length, 0, 1)
        self.cached: list[int] = []

    def feed(self, tokens: list[int], keep: int) -> list[Any]:
        """Append tokens to the cache and return the logits of the last `keep` of them, each [vocab]."""
        batch, past = self.batch, len(self.cached)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i >= len(tokens) - keep
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self.cached += tokens
        return [self.row(i) for i in range(len(tokens) - keep, len(tokens))]

    def row(self, index: int) -> Any:
        pointer = self.lib.llama_get_logits_ith(self.context, index)
        return self.np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))

    def rewind(self, length: int) -> None:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), -1, length, -1)
        del self.cached[length:]


def load(request: Request) -> Generate:
    length = request.longest + request.longest_draft + 1
    target = Model(request.models["target"], request.threads, length)
    propose = proposer(request, length)

    def generate(prompt: list[int], limit: int, emit: Emit, draft_length: int) -> None:
        tokens = list(prompt)
        target.rewind(0)
        tokens.append(int(target.feed(tokens, 1)[0].argmax()))
        emit(tokens[-1:])
        while (left := limit - (len(tokens) - len(prompt))) > 0 and tokens[-1] not in request.eos_ids:
            drafts = propose(tokens, min(draft_length, left - 1))
            wanted = [int(row.argmax()) for row in target.feed([tokens[-1], *drafts], len(drafts) + 1)]
            matched = next((i for i, draft in enumerate(drafts) if draft != wanted[i]), len(drafts))
            fresh = wanted[: matched + 1]
            tokens += fresh
            target.rewind(len(tokens) - 1)
            emit(fresh)
            if not set(fresh).isdisjoint(request.eos_ids):
                return

    return generate


def proposer(request: Request, length: int) -> Propose:
    if request.mode == "plain":
        return lambda tokens, most: []
    if request.mode == "prompt-lookup":
        return lookup_proposer(request)
    draft = Model(request.models["draft"], request.threads, length)
    return draft_proposer(draft, request.settings.get("min_probability", 0.0))


def lookup_proposer(request: Request) -> Propose:
    import numpy as np
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    lookup = LlamaPromptLookupDecoding(max_ngram_size=3)

    def propose(tokens: list[int], most: int) -> list[int]:
        if not most:
            return []
        lookup.num_pred_tokens = most
        return [int(token) for token in lookup(np.array(tokens, np.intc))]

    return propose


def draft_proposer(draft: Model, min_probability: float) -> Propose:
    """Greedy proposals of the draft, up to the first with a probability below `min_probability`."""
    np = draft.np

    def propose(tokens: list[int], most: int) -> list[int]:
        same = next(
            (i for i, (a, b) in enumerate(zip(draft.cached, tokens, strict=False)) if a != b), len(draft.cached)
        )
        draft.rewind(min(same, len(tokens) - 1))
        found: list[int] = []
        pending = tokens[len(draft.cached) :]
        while len(found) < most:
            logits = draft.feed(pending, 1)[0]
            best = int(logits.argmax())
            if min_probability and min_probability * float(np.exp(logits - logits[best]).sum()) > 1:
                break
            found.append(best)
            pending = [best]
        return found

    return propose


if __name__ == "__main__":
    serve(("llama-cpp-python",), load)
