"""Conversations on a toy pair: what is computed anew, the same tokens as a fresh prompt, and every way a turn ends."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx import BadInput, Chat, Failure, Pair, TooLong, load
from pard_onnx.runtime.sessions.session import Session
from pard_onnx.runtime.text.tokenizer import Text

ROWS = 1024 + 64
R1_LIKE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|im_end|>' + m.content.split('THINK')[-1] + '<|end|>' }}{% endif %}{% endfor %}{{ '<|im_end|>' }}"
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"


@pytest.fixture(scope="module")
def folders(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("long toy pair")
    target = write_artifact(root / "target", "target", kv_rows=ROWS)
    return target, write_artifact(root / "draft", "draft", rows=284, kv_rows=ROWS)


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*folders, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(folders: tuple[Path, Path]) -> Pair:
    return load(folders[0], threads=1)


@pytest.fixture(scope="module")
def letters(pair: Pair) -> dict[int, float]:
    """A logit_bias under which replies are capital letters, which the toy tokenizer never merges."""
    allowed = {pair.text.encode(letter)[0] for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    return {token: -100.0 for token in range(pair.target_manifest.spec.vocabulary.size) if token not in allowed}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def fresh(plain: Pair, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[int, ...]:
    return plain.generate(list(messages), draft_length=0, **options).tokens


def common(one: Sequence[int], two: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, two, strict=False)))


def test_a_turn_computes_only_what_is_new(pair: Pair, plain: Pair, letters: dict[int, float]) -> None:
    chat, known = pair.chat("be brief"), 0
    for text in ("the fox", "jumps over", "the lazy dog"):
        result = chat.send(text, max_new_tokens=12, logit_bias=letters)
        expected = fresh(plain, chat.messages[:-1], max_new_tokens=12, logit_bias=letters)
        assert result.tokens == expected
        assert result.text.isupper() and chat.messages[-2:] == [user(text), reply(result.text)]
        assert result.stats.cached_tokens == known
        assert result.stats.prompt_tokens > known
        known = result.stats.prompt_tokens + result.stats.new_tokens - 1  # the last token's row is not computed yet


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_draft_goes_on_too(pair: Pair, letters: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    chat, fed = pair.chat(), []
    chat.send("the quick brown fox jumps over the lazy dog", max_new_tokens=20, draft_length=5, logit_bias=letters)
    session = pair.engine.models[1].session  # type: ignore[union-attr]
    step = session.step
    monkeypatch.setattr(session, "step", lambda ids, k: fed.append(len(ids)) or step(ids, k))
    stats = chat.send("ok", max_new_tokens=8, draft_length=5, logit_bias=letters).stats
    assert fed[0] <= stats.prompt_tokens - stats.cached_tokens + 1 + 6  # the first reply's last round, at most
    assert stats.prompt_tokens > 60


def test_a_reply_that_tokenizes_differently_is_computed_anew(pair: Pair, plain: Pair) -> None:
    """Random bytes are no text: what is sent back is not what was generated."""
    chat = pair.chat()
    first = chat.send("the fox", max_new_tokens=20)
    had = pair.text.encode_chat([user("the fox")]) + list(first.tokens)
    second = chat.send("over", max_new_tokens=20)
    same = common(had, pair.text.encode_chat(chat.messages[:-1]))
    assert second.stats.cached_tokens == same < len(had) - 1
    assert second.tokens == fresh(plain, chat.messages[:-1], max_new_tokens=20)


@pytest.mark.parametrize("what", ["first", "last", "removed", "same"])
def test_edited_history_is_computed_from_the_edit_on(
    pair: Pair, plain: Pair, letters: dict[int, float], what: str
) -> None:
    options = {"max_new_tokens": 10, "logit_bias": letters}
    chat = pair.chat(messages=[user("one"), reply("ONE")])
    chat.send("two", **options)  # type: ignore[arg-type]
    chat.send("three", **options)  # type: ignore[arg-type]
    had = list(chat._sequence.tokens)  # type: ignore[union-attr]
    if what == "first":
        chat.messages[0]["content"] = "ode"
    elif what == "last":
        chat.messages[-1]["content"] = chat.messages[-1]["content"][:4] + "x"
    elif what == "removed":
        del chat.messages[-2:]
    else:  # the user asks again: all of the prompt is there already
        chat.messages[:] = chat.messages[:-2]
    text = "three" if what == "same" else "four"
    result = chat.send(text, **options)  # type: ignore[arg-type]
    ids = pair.text.encode_chat(chat.messages[:-1])
    assert result.stats.cached_tokens == min(common(had, ids), len(ids) - 1)
    assert (what == "first") == (result.stats.cached_tokens < 20)
    assert (what == "same") == (result.stats.cached_tokens == len(ids) - 1)
    assert result.tokens == fresh(plain, chat.messages[:-1], **options)


def test_interleaved_conversations_are_as_alone(pair: Pair) -> None:
    scripts = {"a": ("the fox", "and", "then"), "b": ("lazy dog", "why", "so")}

    def alone(texts: Sequence[str]) -> list[tuple[tuple[int, ...], int]]:
        with pair.chat() as chat:
            results = [chat.send(text, max_new_tokens=15) for text in texts]
        return [(result.tokens, result.stats.cached_tokens) for result in results]

    expected = {name: alone(texts) for name, texts in scripts.items()}
    chats = {name: pair.chat() for name in scripts}
    found: dict[str, list[tuple[tuple[int, ...], int]]] = {name: [] for name in scripts}
    for turn in range(3):
        for name, chat in chats.items():
            result = chat.send(scripts[name][turn], max_new_tokens=15)
            found[name].append((result.tokens, result.stats.cached_tokens))
            pair.generate("something else", max_new_tokens=5)
    assert found == expected


def test_drawn_replies_are_those_of_a_fresh_prompt(pair: Pair, plain: Pair) -> None:
    chat = pair.chat()
    for text in ("the fox", "jumps", "over"):
        result = chat.send(text, max_new_tokens=15, temperature=1.3, seed=5)
        expected = plain.generate(chat.messages[:-1], max_new_tokens=15, temperature=1.3, seed=5, draft_length=0)
        assert result.tokens == expected.tokens


def test_a_reply_cancelled_from_another_thread_is_kept_as_it_is(pair: Pair, plain: Pair) -> None:
    chat = pair.chat()
    chat.send("the fox", max_new_tokens=5)
    stream = chat.stream("jumps", max_new_tokens=200)
    chunks = [next(stream), next(stream)]
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    chunks += stream
    result = stream.result
    assert result.finish_reason == "cancelled" and 2 <= len(result.tokens) < 200
    assert chat.messages[-2:] == [user("jumps"), reply("".join(chunk.text for chunk in chunks))]
    again = chat.send("over", max_new_tokens=10)
    assert again.stats.cached_tokens > 10
    assert again.tokens == fresh(plain, chat.messages[:-1], max_new_tokens=10)


def test_the_step_that_runs_when_a_turn_is_cancelled_is_its_last(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, session, steps = pair.chat(), pair.engine.models[0].session, []  # type: ignore[union-attr]
    stream = chat.stream("jumps", max_new_tokens=200, draft_length=0)
    run = session._session.run_with_iobinding

    class Watched:
        def run_with_iobinding(self, binding: object) -> None:
            run(binding)
            steps.append(1)
            if len(steps) == 4:
                thread = threading.Thread(target=stream.cancel)
                thread.start()
                thread.join()

    monkeypatch.setattr(session, "_session", Watched())
    assert list(stream)
    assert (len(steps), len(stream.result.tokens), stream.result.finish_reason) == (4, 4, "cancelled")


def test_a_reply_out_of_time_is_kept_as_it_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    for module in ("engine", "chat"):  # a clock on which every step takes a second
        monkeypatch.setattr(f"pard_onnx.runtime.{module}.perf_counter", lambda: float(next(ticks)))
    chat = pair.chat()
    result = chat.send("the fox", max_new_tokens=50, timeout=10, draft_length=0)
    assert (result.finish_reason, len(result.tokens)) == ("timeout", 10)
    assert chat.messages == [user("the fox"), reply(result.text)]


def test_a_turn_cut_before_it_has_text_is_as_if_never_sent(pair: Pair) -> None:
    chat = pair.chat()
    assert chat.send("the fox", timeout=1e-9).finish_reason == "timeout"
    stream = chat.stream("the fox")
    stream.cancel()
    assert list(stream) == [] and stream.result.finish_reason == "cancelled"
    assert chat.messages == []


def test_a_stream_closed_early_is_as_if_never_sent(pair: Pair, plain: Pair) -> None:
    chat = pair.chat()
    chat.send("the fox", max_new_tokens=8)
    before = [dict(message) for message in chat.messages]
    with chat.stream("jumps", max_new_tokens=50) as stream:
        next(stream)
    chat.stream("never read").close()
    assert chat.messages == before
    result = chat.send("over", max_new_tokens=8)
    assert result.tokens == fresh(plain, chat.messages[:-1], max_new_tokens=8)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_failing_turn_is_as_if_never_sent(
    pair: Pair, plain: Pair, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = pair.chat()
    chat.send("the fox", max_new_tokens=8)
    before = [dict(message) for message in chat.messages]
    opened = pair.engine.models[0 if role == "target" else 1]
    calls: list[int] = []

    class Broken:
        def run_with_iobinding(self, binding: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("the device is gone")
            working.run_with_iobinding(binding)

    working = opened.session._session  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(opened.session, "_session", Broken())  # type: ignore[union-attr]
        with pytest.raises(Failure, match="the device is gone"):
            chat.send("jumps", max_new_tokens=50, draft_length=4)
    assert chat.messages == before
    result = chat.send("jumps", max_new_tokens=8)
    assert result.tokens == fresh(plain, chat.messages[:-1], max_new_tokens=8)


def test_ctrl_c_between_rounds_is_as_if_never_sent(pair: Pair, plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = pair.chat()
    session = pair.engine.models[0].session  # type: ignore[union-attr]
    step, calls = session.step, []

    def interrupted(ids: list[int], keep: int) -> object:
        calls.append(1)
        found = step(ids, keep)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "step", interrupted)
        chat.send("the fox", max_new_tokens=50)
    assert chat.messages == []
    result = chat.send("the fox", max_new_tokens=20)
    assert result.stats.cached_tokens == result.stats.prompt_tokens - 1
    assert result.tokens == fresh(plain, [user("the fox")], max_new_tokens=20)


def test_a_conversation_that_fills_the_capacity_says_what_to_do(pair: Pair) -> None:
    chat = pair.chat()
    result = chat.send("the fox", max_new_tokens=5000)
    assert (result.stats.prompt_tokens + len(result.tokens), result.finish_reason) == (pair.capacity, "length")
    before = [dict(message) for message in chat.messages]
    with pytest.raises(TooLong, match=r"would have \d+ tokens, but the capacity is 1024 .*; remove earlier messages"):
        chat.send("more")
    assert chat.messages == before
    chat.messages.clear()
    assert chat.send("more", max_new_tokens=3).finish_reason == "length"


def test_closed_conversations_and_pairs_say_so(folders: tuple[Path, Path]) -> None:
    with load(*folders, threads=1) as opened, opened.chat() as chat:
        chat.send("the fox", max_new_tokens=3)
        other = opened.chat()
    with pytest.raises(Failure, match=r"this conversation is closed; open another with pair\.chat\(\)"):
        chat.send("more")
    with pytest.raises(Failure, match="this conversation is closed"):
        chat.save("nowhere.npz")
    with pytest.raises(Failure, match="this pair is closed; load it again"):
        other.send("more")
    with pytest.raises(Failure, match="this pair is closed"):
        opened.chat()


def test_a_conversation_closed_during_a_turn_ends_that_turn_only(pair: Pair) -> None:
    chat = pair.chat()
    later = chat.stream("never")
    with chat.stream("the fox", max_new_tokens=10) as stream:
        next(stream)
        chat.close()
        assert len(list(stream)) > 0 and stream.result.finish_reason == "length"
    with pytest.raises(Failure, match="this conversation is closed"):
        next(later)
    assert pair.generate("fox", max_new_tokens=2).finish_reason == "length"


def test_closing_or_forgetting_a_conversation_frees_its_memory(pair: Pair) -> None:
    closed, forgotten = pair.chat(), pair.chat()
    for chat in (closed, forgotten):
        chat.send("the fox", max_new_tokens=5)
    memory = [weakref.ref(chat._sequence.target._arrays[0]) for chat in (closed, forgotten)]  # type: ignore[union-attr]
    closed.close()
    del forgotten, chat
    gc.collect()
    assert [array() for array in memory] == [None, None]


def test_a_conversation_is_answered_once_at_a_time(pair: Pair) -> None:
    chat = pair.chat()
    first, second = chat.stream("the fox", max_new_tokens=6), chat.stream("the dog", max_new_tokens=6)
    next(first)
    with pytest.raises(Failure, match="this conversation is being answered"):
        next(second)
    with pytest.raises(Failure, match="this conversation is being answered"):
        chat.save("nowhere.npz")
    third = chat.stream("the hen", max_new_tokens=6)
    list(first)
    with pytest.raises(Failure, match="the conversation has changed since this stream was made"):
        next(third)
    assert [message["content"] for message in chat.messages] == ["the fox", first.result.text]
    fourth = chat.stream("the hen", max_new_tokens=6)
    chat.messages[0]["content"] = "the ox"
    with pytest.raises(Failure, match="the conversation has changed since this stream was made"):
        next(fourth)


def test_a_conversations_messages_are_its_own(pair: Pair) -> None:
    given = [user("one"), reply("ONE")]
    one, two = pair.chat(messages=given), pair.chat(messages=given)
    one.messages[0]["content"] = "two"
    one.send("three", max_new_tokens=2)
    assert given == two.messages == [user("one"), reply("ONE")]


def test_of_two_turns_of_a_conversation_one_is_refused_and_others_wait_their_turn(pair: Pair, plain: Pair) -> None:
    """A second turn, a second conversation and a generation, while the first one's turn is under way."""
    chat, other = pair.chat(), pair.chat()
    stream = chat.stream("the fox", max_new_tokens=60)
    next(stream)
    found: list[object] = []

    def others() -> None:
        with pytest.raises(Failure, match="this conversation is being answered"):
            chat.send("the dog")
        found.extend((other.send("the fox", max_new_tokens=60).tokens, pair.generate("dog", max_new_tokens=5).tokens))

    thread = threading.Thread(target=others)
    thread.start()
    thread.join()
    list(stream)
    assert stream.result.tokens == fresh(plain, [user("the fox")], max_new_tokens=60)
    assert found == [stream.result.tokens, plain.generate("dog", max_new_tokens=5).tokens]


def test_threads_share_a_pair_and_get_their_own_tokens(pair: Pair, plain: Pair) -> None:
    texts = ["the fox", "the lazy dog", "quick", "brown", "over", "jumps"]
    expected = {text: fresh(plain, [user(text)], max_new_tokens=30) for text in texts}
    wrong: list[object] = []

    def ask(text: str) -> None:
        for _ in range(5):
            try:
                if pair.chat().send(text, max_new_tokens=30).tokens != expected[text]:
                    wrong.append(text)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_thinking_that_the_template_drops_is_dropped_from_the_cache(
    pair: Pair, plain: Pair, folders: tuple[Path, Path], letters: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(folders[0], R1_LIKE)
    for opened in (pair, plain):
        monkeypatch.setattr(opened.engine, "text", text)
    chat = pair.chat(messages=[user("why"), reply("LONG THOUGHTSTHINKBECAUSE")])
    first = chat.send("and", max_new_tokens=10, logit_bias=letters)
    chat.messages[-1]["content"] = "HMTHINK" + first.text
    second = chat.send("so", max_new_tokens=10, logit_bias=letters)
    assert second.stats.cached_tokens == first.stats.prompt_tokens + 9
    assert second.tokens == fresh(plain, chat.messages[:-1], max_new_tokens=10, logit_bias=letters)
    chat.messages[-1]["content"] = first.text[:3] + "THINK" + "B"  # what follows the thought stands where it began
    third = chat.send("well", max_new_tokens=10, logit_bias=letters)
    assert third.tokens == fresh(plain, chat.messages[:-1], max_new_tokens=10, logit_bias=letters)


@pytest.mark.parametrize(
    ("template", "system", "problem"),
    [
        (R1_LIKE, "be brief", "this model's chat template leaves out system messages"),
        (REFUSING, "be brief", "the chat template refuses these messages: no system"),
        (None, None, "this model has no chat template; give the prompt as text"),
    ],
)
def test_what_a_template_has_no_use_for_is_refused_at_once(
    pair: Pair, folders: tuple[Path, Path], template: str | None, system: str | None, problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pair.engine, "text", Text(folders[0], template))
    with pytest.raises(BadInput, match=problem):
        pair.chat(system)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hi", "messages are a list of objects with role and content, not str"),
        ({"role": "user", "content": "hi"}, "not dict"),
        (None, "not NoneType"),
        (["hi"], "a message has a role and mostly a content, not 'hi'"),
        ([{"content": "hi"}], "a message has a role and mostly a content, not {'content': 'hi'}"),
        ([{"role": None, "content": "hi"}], "a message has a role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "a part of the type 'image_url'"),
        ([{"role": "user", "content": 5}], "the chat template refuses these messages"),
    ],
)
def test_what_is_no_message_is_refused(pair: Pair, messages: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        pair.chat(messages=messages)
    if isinstance(messages, list):
        chat = pair.chat()
        chat.messages = messages
        with pytest.raises(BadInput, match=problem):
            chat.send("hi")


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("", {}, "a message is text of at least one character, not ''"),
        (b"hi", {}, "not b'hi'"),
        ("half \ud83d", {}, "not valid Unicode"),
        ("hi", {"temprature": 1}, "unknown option temprature; did you mean temperature?"),
        ("hi", {"draft_length": 33}, "draft_length must be from 0 to 32, not 33"),
    ],
)
def test_bad_arguments_of_a_turn_are_refused_at_once(
    pair: Pair, text: Any, options: dict[str, Any], problem: str
) -> None:
    chat = pair.chat()
    with pytest.raises(BadInput, match=problem):
        chat.stream(text, **options)
    assert chat.messages == []


def rows(session: Session, pair: Pair, role: str, tokens: list[int]) -> Any:
    """KV rows of these tokens in an empty cache, [2 * layers, kv_heads, tokens, head_dim]."""
    own, cache = session.cache, getattr(pair.engine.new_sequence(), role)
    session.attach(cache)
    if tokens:
        session.step(tokens, 1)  # type: ignore[attr-defined]
    session.attach(own)
    return cache.read(0, len(tokens))


def require_prefixes(pair: Pair, chat: Chat) -> None:
    """Each cache holds the rows of the tokens that it says it does."""
    caches = chat._sequence
    assert caches and caches.draft
    target, draft, start = caches.target.length, caches.draft.length, caches.memory.start
    assert target <= len(caches.tokens) and start + draft <= len(caches.tokens)
    expected = rows(pair.engine.models[0].session, pair, "target", caches.tokens[:target])
    np.testing.assert_allclose(caches.target.read(0, target), expected, rtol=1e-3, atol=1e-3)
    expected = rows(pair.engine.models[1].session, pair, "draft", caches.tokens[start : start + draft])
    np.testing.assert_allclose(caches.draft.read(0, draft), expected, rtol=1e-3, atol=1e-3)


TEXTS = st.sampled_from(["the fox", "jumps", "over the lazy dog", "é", "X"])
TURNS = st.fixed_dictionaries(
    {
        "text": TEXTS,
        "chunks": st.sampled_from([1, 2, 4, 99]),
        "end": st.sampled_from(["read", "read", "cancel", "close"]),
        "limit": st.integers(1, 12),
        "length": st.sampled_from(["auto", 0, 1, 4]),
        "letters": st.booleans(),
        "edit": st.sampled_from(["", "", "", "clear", "drop", "change", "shorten"]),
        "which": st.integers(0, 9),
    }
)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(TURNS, min_size=2, max_size=6))
def test_any_turns_edits_and_cancellations_leave_caches_of_prefixes_and_the_same_tokens(
    pair: Pair, plain: Pair, letters: dict[int, float], turns: list[dict[str, Any]]
) -> None:
    chat = pair.chat()
    for turn in turns:
        edit(chat, turn["edit"], turn["which"])
        bias = letters if turn["letters"] else {}
        options = {"max_new_tokens": turn["limit"], "logit_bias": bias}
        expected = fresh(plain, [*chat.messages, user(turn["text"])], **options)
        before = [dict(message) for message in chat.messages]
        stream = chat.stream(turn["text"], draft_length=turn["length"], **options)
        found = [token for _, chunk in zip(range(turn["chunks"]), stream, strict=False) for token in chunk.tokens]
        if turn["end"] == "close" and len(found) < turn["limit"]:
            stream.close()
            assert chat.messages == before
        else:
            if turn["end"] == "cancel":
                stream.cancel()
            found += [token for chunk in stream for token in chunk.tokens]
            result = stream.result
            said = [user(turn["text"]), reply(result.text)] if result.text or len(found) == turn["limit"] else []
            assert chat.messages == before + said
        assert tuple(found) == expected[: len(found)]
        assert turn["end"] != "read" or tuple(found) == expected
        require_prefixes(pair, chat)


def edit(chat: Chat, how: str, which: int) -> None:
    if how == "clear":
        chat.messages.clear()
    elif how == "drop":
        del chat.messages[-2:]
    elif chat.messages and how in ("change", "shorten"):
        message = chat.messages[which % len(chat.messages)]
        message["content"] = message["content"][:-1] if how == "shorten" else message["content"] + "y"


ARGUED = "{{ tools | tojson }}{{ style }}{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}{{ mood }}"


def test_template_arguments_of_a_conversation_and_of_a_turn(
    pair: Pair, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = Text(folders[0], ARGUED)
    monkeypatch.setattr(pair.engine, "text", text)
    asked, tools = [user("the fox")], [{"name": "find"}]

    def prompt(result: Any) -> tuple[int, tuple[int, ...]]:
        return result.stats.prompt_tokens, result.tokens

    def expected(tools: str = "null", style: str = "", mood: str = "") -> tuple[int, tuple[int, ...]]:
        ids = text.encode(f"{tools}{style}userthe fox{mood}")
        return len(ids), pair.generate(ids, max_new_tokens=5).tokens

    written = {"tools": '[{"name": "find"}]', "style": "so"}
    wanted = {"tools": tools, "style": "so"}
    chat = pair.chat(template_arguments=wanted)
    turn = chat.send("the fox", max_new_tokens=5, template_arguments={"style": "thus", "mood": "calm"})
    assert prompt(turn) == expected(written["tools"], "thus", "calm")
    del chat.messages[:]
    assert prompt(chat.send("the fox", max_new_tokens=5)) == expected(**written)
    assert chat.template_arguments == wanted
    from_text = pair.generate("the fox", chat=True, max_new_tokens=5, template_arguments=wanted)
    assert prompt(from_text) == expected(**written)
    assert prompt(pair.generate(asked, max_new_tokens=5, template_arguments=wanted)) == expected(**written)
    assert prompt(pair.generate(asked, max_new_tokens=5)) == expected()
    del chat.messages[:]
    chat.save(tmp_path / "saved")
    for arguments, said in ((wanted, written), (None, {})):
        with pair.restore(tmp_path / "saved", arguments) as restored:
            assert prompt(restored.send("the fox", max_new_tokens=5)) == expected(**said)
    with pytest.raises(BadInput, match="tools in template_arguments are a list of JSON objects"):
        pair.chat(template_arguments={"tools": "find"})


def test_messages_of_tool_calls(pair: Pair, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.engine, "text", Text(folders[0], ARGUED))
    calls = [{"function": {"name": "find", "arguments": {}}}]
    for message in ({"role": "assistant", "tool_calls": calls}, {"role": "assistant", "content": None}):
        chat = pair.chat(messages=[user("a"), message, {"role": "tool", "content": [{"type": "text", "text": "b"}]}])
        result = chat.send("c", max_new_tokens=3)
        assert result.stats.prompt_tokens == len(pair.text.encode("nulluseraassistanttoolbuserc"))
        assert chat.messages[1] == message


def test_special_tokens_of_users_are_the_chats_choice_and_a_turns(pair: Pair) -> None:
    """The option of a turn beats the conversation's; a refused turn leaves the conversation as it was."""
    forged = "hi" + next(iter(pair.text.special_ids()), "<|none|>")
    chat = pair.chat(special_tokens="refuse")
    if pair.text.special_ids():
        with pytest.raises(BadInput, match="has the special token"):
            chat.send(forged, max_new_tokens=1)
        assert chat.messages == []
        with pytest.raises(BadInput, match="has the special token"):
            pair.generate([user(forged)], special_tokens="refuse", max_new_tokens=1)
    assert chat.send(forged, max_new_tokens=1, special_tokens="text").tokens
    with pytest.raises(BadInput, match="special_tokens must be one of"):
        pair.chat(special_tokens="none")
