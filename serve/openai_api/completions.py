"""POST /v1/completions: plain continuations of texts or token ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.result import Result
from pard_onnx.runtime.sampling.logprobs import LEAST, TokenLogprob
from pard_onnx.serve.endpoint import GenerationEndpoint
from pard_onnx.serve.errors import bad_field
from pard_onnx.serve.fields import COMPLETION, MOST_CHOICES, Read
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.service import Service, finish_reason, new_id, require_text
from pard_onnx.serve.speculation import Progress, timings, usage, whole
from pard_onnx.serve.sse import event

from .chat import head

USUAL_TOKENS = 16  # OpenAI's default of this endpoint
Plain = str | list[int]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What a request for completions asks for."""

    model: str | None
    prompts: tuple[Plain, ...]
    options: dict[str, Any]  # keyword arguments of `Pair.stream`
    n: int  # texts of each prompt
    stream: bool
    with_usage: bool  # whether the stream ends with the usage
    echo: bool  # whether the prompt is a part of the text
    only_echo: bool  # whether nothing follows it

    @classmethod
    def read(cls, found: Read) -> CompletionRequest:
        """Raises ApiError (400), which names the field."""
        own, options = found.own, {"max_new_tokens": USUAL_TOKENS, **found.options}
        echo, stream, n = own.get("echo", False), own.get("stream", False), own.get("n", 1)
        prompts = checked_prompts(own.get("prompt"))
        if len(prompts) * n > MOST_CHOICES:
            raise bad_field(
                "n", f"n: {len(prompts)} prompts and n {n} are more than {MOST_CHOICES} texts; ask for fewer"
            )
        only_echo = options["max_new_tokens"] == 0
        if only_echo and not echo:
            raise bad_field("max_tokens", "max_tokens must be at least 1, or 0 with echo, not 0")
        options["max_new_tokens"] = max(1, options["max_new_tokens"])
        if "logprobs" in own:
            options["logprobs"] = own["logprobs"]
            if echo:
                options["prompt_logprobs"] = own["logprobs"]
            if echo and stream:
                raise bad_field("echo", "echo with logprobs is not streamed; leave out echo, logprobs or stream")
        return cls(
            own.get("model"), prompts, options, n, stream, own.get("stream_options", False), echo, only_echo
        )  # fmt: skip


def checked_prompts(prompt: Any) -> tuple[Plain, ...]:
    """One prompt, a text or a list of token ids, or a list of such prompts."""
    wanted = "prompt: give a text, a list of token ids, or a list of such prompts"
    if isinstance(prompt, str) or _is_ids(prompt):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise bad_field("prompt", wanted)
    for number, one in enumerate(prompt):
        if not isinstance(one, str) and not _is_ids(one):
            raise bad_field("prompt", f"{wanted}; prompt[{number}] is none of these")
    return tuple(prompt)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


async def answer(service: Service, wanted: CompletionRequest) -> dict[str, Any]:
    """The whole answer."""
    results: list[Result] = []
    choices: list[dict[str, Any]] = []
    async with service.model(wanted.model) as model:
        for prompt in wanted.prompts:
            begin = await echoed(model, prompt) if wanted.echo else ""
            for number in range(wanted.n):
                async with service.generation(model, prompt, wanted.options, number, whole=True) as generation:
                    result = require_text(await generation.read())
                results.append(result)
                first = await first_token(model, prompt) if result.prompt_logprobs else ""
                choices.append(choice(len(choices), begin, first, result, wanted))
        return {
            **head(new_id("cmpl"), "text_completion", model),
            "choices": choices,
            "usage": usage(results[:: wanted.n], [] if wanted.only_echo else results),
            "timings": timings(results[0]),
            "pard": whole(results[0]),
        }


async def streamed(service: Service, wanted: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """The events of the answer. Several texts come one after the other."""
    results: list[Result] = []
    end = {"usage": None} if wanted.with_usage else {}
    async with service.model(wanted.model) as model:
        base = head(new_id("cmpl"), "text_completion", model)

        def written(text: str, logprobs: Any, reason: str | None, **more: Any) -> bytes:
            part = {"index": len(results), "text": text, "logprobs": logprobs, "finish_reason": reason}
            return event({**base, "choices": [part], **end, **more})

        for prompt in wanted.prompts:
            begin = await echoed(model, prompt) if wanted.echo else ""
            for number in range(wanted.n):
                progress, offset = Progress(), 0
                async with service.generation(model, prompt, wanted.options, number) as generation:
                    if begin:
                        yield written(begin, None, None)
                    async for chunk in generation.chunks():
                        if wanted.only_echo:
                            continue
                        logprobs = None if chunk.logprobs is None else logprobs_of(chunk.logprobs, offset)
                        offset += sum(len(one.text) for one in chunk.logprobs or ())
                        yield written(chunk.text, logprobs, None, pard=progress.add(chunk))
                    result = require_text(generation.result)
                reason = "length" if wanted.only_echo else finish_reason(result)
                yield written("", None, reason, pard=whole(result), timings=timings(result))
                results.append(result)
        if wanted.with_usage:
            found = usage(results[:: wanted.n], [] if wanted.only_echo else results)
            yield event({**base, "choices": [], "usage": found})


async def echoed(model: OpenModel, prompt: Plain) -> str:
    """The prompt as text."""
    if isinstance(prompt, str):
        return prompt
    return await in_worker(lambda: model.pair.detokenize(prompt, skip_special_tokens=False))


async def first_token(model: OpenModel, prompt: Plain) -> str:
    """The text of the prompt's first token, which has no log probability."""
    pair = model.pair
    return await in_worker(lambda: pair.detokenize(pair.encode(prompt)[:1], skip_special_tokens=False))


def choice(number: int, begin: str, first: str, result: Result, wanted: CompletionRequest) -> dict[str, Any]:
    """One text. begin: the prompt's text, if it is a part of it; first: that of its first token."""
    logprobs = None
    if result.logprobs is not None:
        new = () if wanted.only_echo else result.logprobs
        logprobs = logprobs_of((*(result.prompt_logprobs or ()), *new), first=first)
    reason = "length" if wanted.only_echo else finish_reason(result)
    text = begin if wanted.only_echo else begin + result.text
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}


def logprobs_of(tokens: Sequence[TokenLogprob | None], offset: int = 0, first: str = "") -> dict[str, Any]:
    """Log probabilities in the form of this endpoint. offset: where the first token begins in the text.

    None stands for the first token of a prompt, before which there is nothing; its text is `first`.
    """
    texts = [first if one is None else one.text for one in tokens]
    offsets: list[int] = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else max(one.logprob, LEAST) for one in tokens],
        "top_logprobs": [
            None if one is None else {other.text: max(other.logprob, LEAST) for other in one.top} for one in tokens
        ],
        "text_offset": offsets,
    }


completions = GenerationEndpoint(COMPLETION, CompletionRequest.read, answer, streamed)
