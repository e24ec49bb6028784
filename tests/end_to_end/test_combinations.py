"""Options that meet, on the shipped pair with a template that thinks and calls tools.

Each combination gives what plain decoding gives, and what its parts give by themselves.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from json_schemas import SCHEMAS
from jsonschema import Draft202012Validator
from toy_artifacts import QWEN_LIKE

from pard_onnx import Failure, Pair, Result, load
from pard_onnx.models import demo
from pard_onnx.models.manifest import Manifest

pytest.importorskip("llguidance")
LENGTHS: list[Any] = [0, 4, "auto"]
WAYS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 5}]
PROMPT = demo.prompts()[0]
SCHEMA = SCHEMAS["numbers with bounds"]


def get_weather(city: Literal["Ulm", "Köln"], days: Literal[1, 2] = 1) -> str:
    """The weather.

    Args:
        city: The city
        days: How many days
    """
    return f"{city}: rain, {days}"


def stop() -> None:
    """Ends it."""


TOOLS = [get_weather, stop]
CALL: dict[str, Any] = {"tools": TOOLS, "tool_choice": "get_weather", "max_reasoning_tokens": 6}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def folders(demo_folder: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The shipped pair with a chat template, which code models do not have."""
    root = tmp_path_factory.mktemp("chat pair")
    for role, precision in (("target", "int4"), ("draft", "int8")):
        shutil.copytree(demo_folder(f"demo-{role}", precision), root / role)
        old = Manifest.read(root / role)
        replace(old, spec=replace(old.spec, chat_template=QWEN_LIKE)).write(root / role)
    return root / "target", root / "draft"


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*folders) as opened:
        yield opened
        assert opened.engine._turns.idle


def parts(result: Result) -> tuple[Any, ...]:
    """All that must not depend on drafts, callers and caches."""
    calls = tuple((call.name, call.arguments) for call in result.tool_calls)
    answer = result.text, result.reasoning, calls, result.tokens, result.finish_reason
    return *answer, result.logprobs, result.prompt_logprobs


def plain(pair: Pair, prompt: Any, **options: Any) -> Result:
    """The result of plain decoding, which is that of all drafts; its chunks agree with it."""
    results = []
    for length in LENGTHS:
        stream = pair.stream(prompt, draft_length=length, **options)
        chunks = list(stream)
        result = stream.result
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning
        if result.logprobs is not None:
            assert all(len(chunk.logprobs or ()) == len(chunk.tokens) for chunk in chunks)
            assert tuple(one for chunk in chunks for one in chunk.logprobs or ()) == result.logprobs
        results.append(result)
    assert all(parts(one) == parts(results[0]) for one in results)
    return results[0]


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "seeded"])
def test_log_probabilities_under_a_grammar_are_those_without_it(pair: Pair, way: dict[str, Any]) -> None:
    result = plain(pair, PROMPT, response_format=SCHEMA, logprobs=3, prompt_logprobs=1, max_new_tokens=80, **way)
    Draft202012Validator(SCHEMA).validate(json.loads(result.text))
    assert [one.token for one in result.logprobs or ()] == list(result.tokens)
    assert pair.score(PROMPT, result.tokens, logprobs=3).tokens == result.logprobs
    assert any(one.token not in [other.token for other in one.top] for one in result.logprobs or ())


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "seeded"])
def test_tools_of_several_prompts(pair: Pair, way: dict[str, Any]) -> None:
    prompts: list[Any] = [[user(text)] for text in ("fox", "dog", "é ü")]
    options = {**CALL, **way, "logprobs": 0, "max_new_tokens": 80}
    alone = [plain(pair, prompt, **options) for prompt in prompts]
    found = pair.generate(prompts, **options)  # type: ignore[arg-type]
    assert [parts(one) for one in found] == [parts(one) for one in alone]
    assert [one.tool_calls for one in found] == [one.tool_calls for one in alone]  # their ids too
    for result in found:
        assert [call.name for call in result.tool_calls] == ["get_weather"]
        assert len(result.logprobs or ()) == len(result.tokens)
        assert result.text == ""


def test_several_prompts_in_a_task(pair: Pair) -> None:
    prompts: list[Any] = [[user("fox")], "def f(x):", [1, 2, 3]]

    async def ask(prompts: Any, **options: Any) -> Any:
        return await pair.agenerate(prompts, max_new_tokens=12, **options)

    expected = pair.generate(prompts, max_new_tokens=12)
    assert [parts(one) for one in asyncio.run(ask(prompts))] == [parts(one) for one in expected]
    assert [parts(one) for one in asyncio.run(ask(iter(prompts)))] == [parts(one) for one in expected]
    for wrong, message in ((["a", ""], r"^prompt\[1\]: the prompt is empty"), ([[1], [10**9]], r"^prompt\[1\]: token")):
        with pytest.raises(Exception, match=message) as here:
            pair.generate(wrong)
        with pytest.raises(type(here.value), match=message):
            asyncio.run(ask(wrong))


def test_a_task_that_is_cancelled_ends_a_list_of_prompts(pair: Pair) -> None:
    asked: list[int] = []

    async def main() -> None:
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()

        def watch(text: str, tokens: Sequence[int]) -> bool:
            asked.append(len(tokens))
            loop.call_soon_threadsafe(seen.set)
            return False

        task = asyncio.create_task(pair.agenerate(["def f(x):"] * 50, max_new_tokens=200, stop_when=watch))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    pair.engine._turns.wait_for_abandoned()
    assert pair.engine._turns.idle
    assert asked.count(1) == 1


def test_scores_while_streams_run(pair: Pair) -> None:
    prompts = demo.prompts()[:4]
    options: Any = [
        {},
        {"logprobs": 2},
        {"response_format": SCHEMA},
        {"prompt_logprobs": 1, "temperature": 1, "seed": 1},
    ]
    alone = [pair.generate(prompt, max_new_tokens=60, **way) for prompt, way in zip(prompts, options, strict=True)]
    scored = pair.score(prompts, [one.tokens for one in alone], logprobs=1)
    found: list[Any] = [None] * len(prompts)
    scores: list[Any] = []

    def read(number: int) -> None:
        found[number] = pair.generate(prompts[number], max_new_tokens=60, **options[number])

    def score() -> None:
        scores.extend(pair.score(prompts, [one.tokens for one in alone], logprobs=1) for _ in range(2))

    work = [*(lambda number=number: read(number) for number in range(len(prompts))), score, score]
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [parts(one) for one in found] == [parts(one) for one in alone]
    assert scores == [scored] * 4


@pytest.mark.parametrize("begun", [False, True])
def test_a_grammar_after_the_reasoning_of_a_conversation_that_is_sent_whole(
    folders: tuple[Path, Path], pair: Pair, begun: bool
) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 60,
        "max_reasoning_tokens": 9,
        "template_arguments": {"begun": True} if begun else {},
        "logprobs": 1,
    }
    grammars: list[dict[str, Any]] = [{"choice": ["yes", "no"]}, {"response_format": SCHEMA}, {"regex": "[a-f]{3,9}"}]
    with load(*folders, cache_bytes=0) as other:
        for way in WAYS:
            messages = [user("x = 1\n" * 40)]
            for turn, grammar in enumerate(grammars):
                result = plain(pair, messages, **options, **grammar, **way)
                without = other.generate(messages, **options, **grammar, **way)
                assert parts(without) == parts(result) and without.stats.cached_tokens == 0
                again = pair.generate(messages, **options, **grammar, **way)
                assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
                if turn:
                    first = pair.generate([*messages[:-1], user("other")], max_new_tokens=1)
                    assert first.stats.cached_tokens > 40 * 3
                reply = {"role": "assistant", "content": result.text, "reasoning_content": result.reasoning}
                messages = [*messages, reply, user(f"and {turn}?")]
                assert not begun or result.reasoning
                if "choice" in grammar:
                    assert result.text in grammar["choice"]


def conversation(turns: int) -> list[dict[str, Any]]:
    """Turns with a call of a tool each."""
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}
    said: list[dict[str, Any]] = []
    for turn in range(turns):
        said += [
            user(f"{turn} " + "word " * 60),
            {"role": "assistant", "content": "", "tool_calls": [{**call, "id": f"call_{turn}"}]},
            {"role": "tool", "tool_call_id": f"call_{turn}", "name": "get_weather", "content": "rain"},
            {"role": "assistant", "content": f"It rains, {turn}."},
        ]
    return said


@pytest.mark.parametrize("overflow", ["drop-oldest", "drop-middle"])
def test_turns_with_tools_that_are_dropped(pair: Pair, overflow: Any) -> None:
    history = conversation(40)
    asked = [{"role": "system", "content": "Be brief."}, *history, user("and now?")]
    options: dict[str, Any] = {**CALL, "max_new_tokens": 60, "logprobs": 1}
    result = plain(pair, asked, overflow=overflow, **options)
    dropped = result.stats.dropped_messages
    assert dropped and dropped % 4 == 0
    first = 4 if overflow == "drop-middle" else 0
    left = [asked[0], *history[:first], *history[first + dropped :], asked[-1]]
    expected = pair.generate(left, **options)
    assert parts(expected) == parts(result)
    assert [call.id for call in expected.tool_calls] == [call.id for call in result.tool_calls]
    assert pair.count_tokens(asked, overflow=overflow, **options) == result.stats.prompt_tokens
    with pair.chat("Be brief.", history, overflow=overflow) as chat:
        turn = chat.send("and now?", **options)
        assert parts(turn) == parts(expected) and turn.stats.dropped_messages == dropped
        call = turn.tool_calls[0]
        answer = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "sun"}
        later = chat.send([answer], tools=TOOLS, max_new_tokens=20)  # the last turn has its call and the result
        assert later.stats.dropped_messages >= dropped
        assert len(chat.messages) == 1 + len(history) + 4


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "seeded"])
def test_a_text_that_a_function_ends_has_its_log_probabilities(pair: Pair, way: dict[str, Any]) -> None:
    whole = plain(pair, PROMPT, max_new_tokens=40, logprobs=2, prompt_logprobs=0, **way)
    for length in (1, 2, 7, 20):
        ended = plain(
            pair,
            PROMPT,
            max_new_tokens=40,
            logprobs=2,
            prompt_logprobs=0,
            stop_when=lambda _, tokens, length=length: len(tokens) == length,
            **way,
        )
        assert ended.finish_reason == "stop"
        assert ended.tokens == whole.tokens[:length]
        assert ended.logprobs == (whole.logprobs or ())[:length]
        assert ended.prompt_logprobs == whole.prompt_logprobs
        assert whole.text.startswith(ended.text.rstrip("�"))


@pytest.mark.parametrize("k", LENGTHS)
def test_what_ends_a_text_sees_of_a_reply(pair: Pair, k: Any) -> None:
    """The answer so far, and all tokens."""
    seen: list[tuple[str, int]] = []

    def watch(text: str, tokens: Sequence[int]) -> bool:
        seen.append((text, len(tokens)))
        return False

    options: dict[str, Any] = {"max_reasoning_tokens": 6, "template_arguments": {"begun": True}}
    result = pair.generate(
        [user("hi")], stop_when=watch, response_format=SCHEMA, draft_length=k, max_new_tokens=90, **options
    )
    assert [count for _, count in seen] == list(range(1, len(result.tokens) + 1))
    assert seen[5][0] == "" and result.reasoning
    assert all(result.text.startswith(text) for text, _ in seen) and seen[-1][0] == result.text
    seen.clear()
    called = pair.generate([user("hi")], stop_when=watch, draft_length=k, **CALL)
    assert called.tool_calls and {text for text, _ in seen} == {""}


def favouring(pair: Pair, text: str) -> Callable[[Sequence[int], Any], Any]:
    """A function that makes the model write this text, where it may."""
    ids, start = pair.text.encode_plain(text), len(pair.encode(PROMPT))

    def process(tokens: Sequence[int], row: Any) -> Any:
        assert np.isfinite(row).sum() > 100  # it reads rows before the grammar's mask
        if len(tokens) - start < len(ids):
            row[ids[len(tokens) - start]] += 1000
        return row

    return process


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "seeded"])
def test_a_function_changes_rows_before_the_grammar(pair: Pair, way: dict[str, Any]) -> None:
    options: dict[str, Any] = {"choice": ["alpha", "beta", "gamma"], "logprobs": 1, "max_new_tokens": 20, **way}
    for wanted in ("alpha", "beta", "gamma"):
        found = plain(pair, PROMPT, logits_processor=favouring(pair, wanted), **options)
        assert found.text == wanted
    outside = plain(pair, PROMPT, logits_processor=favouring(pair, "0123"), **options)
    assert outside.text in options["choice"]
    assert pair.score(PROMPT, outside.tokens, logprobs=1).tokens == outside.logprobs


def test_a_function_that_bans_all_that_the_grammar_allows(pair: Pair) -> None:
    first = sorted(
        {pair.text.encode_plain(text[:size])[0] for text in ("yes", "no") for size in range(1, len(text) + 1)}
    )

    def ban(tokens: Sequence[int], row: Any) -> Any:
        row[first] = -np.inf
        return row

    before = pair.generate(PROMPT, choice=["yes", "no"])
    for k in LENGTHS:
        with pytest.raises(Failure) as error:
            pair.generate(PROMPT, choice=["yes", "no"], logits_processor=ban, draft_length=k)
        assert "\n" not in str(error.value) and "a grammar or another edit" in str(error.value)
    assert parts(pair.generate(PROMPT, choice=["yes", "no"])) == parts(before)


def test_one_place_for_streams_that_are_half_read(folders: tuple[Path, Path], pair: Pair) -> None:
    """Each stream takes the place of the one before, and goes on as if it had kept it."""
    prompts: list[Any] = [*demo.prompts()[:3], [user("hi")]]
    ways: list[dict[str, Any]] = [
        {"logprobs": 2, "prompt_logprobs": 1},
        {"response_format": SCHEMA, "logprobs": 0},
        {"prompt_logprobs": 0, "temperature": 1.0, "seed": 3},
        {**CALL, "logprobs": 1, "prompt_logprobs": 2, "template_arguments": {"begun": True}},
    ]
    for k in LENGTHS:
        options: dict[str, Any] = {"max_new_tokens": 50, "draft_length": k}
        alone = [pair.generate(prompt, **options, **way) for prompt, way in zip(prompts, ways, strict=True)]
        with load(*folders, max_live=1) as single:
            streams = [single.stream(prompt, **options, **way) for prompt, way in zip(prompts, ways, strict=True)]
            found: list[list[Any]] = [[] for _ in streams]
            open_ = set(range(len(streams)))
            while open_:
                for number in sorted(open_):
                    chunk = next(streams[number], None)
                    if chunk is None:
                        open_.remove(number)
                    else:
                        found[number].append(chunk)
                if len(open_) == 3:
                    single.score("def f(", "x)")
            assert [parts(stream.result) for stream in streams] == [parts(one) for one in alone]
            for chunks, result in zip(found, alone, strict=True):
                joined = tuple(one for chunk in chunks for one in chunk.logprobs or ())
                assert joined == (result.logprobs or ())
            assert single.engine._turns.idle


def test_pairs_that_share_models_stream_at_the_same_time(folders: tuple[Path, Path], pair: Pair) -> None:
    prompts = demo.prompts()[:3]
    ways: list[dict[str, Any]] = [
        {"response_format": SCHEMA, "logprobs": 1},
        {"prompt_logprobs": 0},
        {"temperature": 1, "seed": 2},
    ]
    asked: list[tuple[Any, dict[str, Any]]] = list(zip(prompts, ways, strict=True))
    asked.append(([user("hi")], CALL))
    expected = [parts(pair.generate(prompt, max_new_tokens=40, **way)) for prompt, way in asked]
    with load(pair, folders[1]) as other, load(pair, None) as alone:
        pairs = [pair, other, alone]
        found: dict[tuple[int, int], Any] = {}

        def work(which: int) -> None:
            for number, (prompt, way) in enumerate(asked):
                found[which, number] = parts(pairs[which].generate(prompt, max_new_tokens=40, **way))

        threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in (0, 1, 2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert len(found) == 12
    assert all(one == expected[number] for (_, number), one in found.items())


@pytest.mark.parametrize(
    "options",
    [
        {"tools": TOOLS},
        CALL,
        {"tools": TOOLS, "tool_choice": "none"},
        {"max_reasoning_tokens": 3, "template_arguments": {"begun": True}},
        {"choice": ["yes", "no"], "template_arguments": {"begun": True}},
        {"overflow": "drop-oldest", "tools": TOOLS},
        {"overflow": "drop-middle", "max_new_tokens": 400},
        {"special_tokens": "encode"},
    ],
    ids=lambda options: ", ".join(options),
)
def test_tokens_are_counted_as_they_are_read(pair: Pair, options: dict[str, Any]) -> None:
    turns = 40 if "overflow" in options else 2
    for prompt in ([user("<think> hi </think>")], [*conversation(turns), user("é?")]):
        counted = pair.count_tokens(prompt, **options)
        assert counted == pair.generate(prompt, **{**options, "stop_when": lambda *_: True}).stats.prompt_tokens


@pytest.mark.parametrize("k", LENGTHS)
def test_a_task_that_goes_away_within_a_grammar(pair: Pair, k: Any) -> None:
    options: dict[str, Any] = {"response_format": SCHEMA, "max_new_tokens": 90, "draft_length": k, "logprobs": 1}
    expected = pair.generate(PROMPT, **options)

    async def leave(read: int) -> str:
        text = ""
        async with pair.stream(PROMPT, **options) as stream:
            async for chunk in stream:
                text += chunk.text
                read -= 1
                if not read:
                    break
        return text

    async def cancelled() -> None:
        task = asyncio.create_task(pair.agenerate(PROMPT, **{**options, "stop_when": lambda *_: begun()}))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for read in (1, 3):
        assert expected.text.startswith(asyncio.run(leave(read)))
        assert parts(pair.generate(PROMPT, **options)) == parts(expected)
    seen = asyncio.Event()

    def begun() -> bool:
        seen._loop.call_soon_threadsafe(seen.set)  # type: ignore[attr-defined]
        return False

    async def main() -> None:
        seen._loop = asyncio.get_running_loop()  # type: ignore[attr-defined]
        await cancelled()

    asyncio.run(main())
    assert parts(pair.generate(PROMPT, **options)) == parts(expected)


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "seeded"])
def test_a_chat_with_tools_in_tasks(pair: Pair, way: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "logprobs": 0, **way}

    async def talk(k: Any) -> list[Any]:
        with pair.chat() as chat:
            turns = [await chat.asend("Umbrella?", **CALL, **options, draft_length=k)]
            for call in turns[-1].tool_calls:
                content = get_weather(**json.loads(call.arguments))
                answer = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}
                turns.append(await chat.asend([answer], tools=TOOLS, tool_choice="none", **options, draft_length=k))
            last: dict[str, Any] = {"choice": ["yes", "no"], "max_reasoning_tokens": 5}
            turns.append(await chat.asend("Sure?", **last, **options, draft_length=k))
            assert turns[-1].stats.cached_tokens > 0
            return [*map(parts, turns), chat.messages]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(talk(k) for k in [*LENGTHS, *LENGTHS]))

    found = asyncio.run(all_at_once())
    assert all(one == found[0] for one in found)
    assert found[0][-2][0] in ("yes", "no")
    assert [message["role"] for message in found[0][-1]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
