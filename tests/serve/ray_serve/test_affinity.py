"""The key of a conversation: later turns keep it, other conversations have another one, bad bodies have none."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette")

from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.serve.ray import affinity
from pard_onnx.serve.ray.affinity import OPENING, ResponseKeys, conversation_key

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}))


def key(body: Any, **headers: str) -> str:
    return conversation_key(headers, json.dumps(body).encode(), ResponseKeys())


@given(system=TEXT, first=TEXT, later=MESSAGES, form=st.sampled_from(["messages", "input"]))
def test_later_turns_keep_the_key(system: str, first: str, later: list[Any], form: str) -> None:
    opening = [{"role": "system", "content": system}, {"role": "user", "content": first}]
    begun = key({form: opening})
    assert begun
    assert key({form: opening + later, "temperature": 1}) == begun


@given(first=TEXT, second=TEXT)
def test_other_conversations_have_another_key(first: str, second: str) -> None:
    keys = {key({"messages": [{"role": "user", "content": text}]}) for text in (first, second)}
    assert len(keys) == len({first, second})


@pytest.mark.parametrize("name", ["model", "system", "instructions"])
def test_what_stands_before_all_messages_counts(name: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    assert key({**body, name: "a"}) != key({**body, name: "b"})


@pytest.mark.parametrize("name", ["prompt", "input", "content"])
def test_a_prompt_that_grows_keeps_its_key(name: str) -> None:
    begun = key({name: "a" * OPENING})
    assert begun
    assert key({name: "a" * OPENING + "b"}) == begun
    assert key({name: "b" * OPENING}) != begun
    assert key({name: [1, 2]}) != key({name: [1, 3]})


def test_a_client_may_name_the_conversation() -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "prompt_cache_key": "mine"}
    assert key(body) == "mine"
    assert key(body, **{"x-session-id": "of the header"}) == "of the header"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"{}", b'{"messages": []}', b"[" * 100_000])
def test_requests_without_a_beginning_have_no_key(body: bytes) -> None:
    assert conversation_key({}, body, ResponseKeys()) == ""


@given(st.recursive(st.none() | TEXT | st.integers(), lambda one: st.lists(one) | st.dictionaries(TEXT, one)))
def test_any_value_of_any_field_has_a_key_or_none(value: Any) -> None:
    for name in ("messages", "input", "prompt", "prompt_cache_key", "system", "model", "previous_response_id"):
        assert isinstance(key({name: value}), str)


@pytest.mark.parametrize("space", ["", " "])
def test_a_response_has_the_key_of_the_one_before(space: str) -> None:
    known = ResponseKeys()
    assert known.add(b'data: {"type":"response.created","response":{"id":%s"resp_1a"' % space.encode(), "key")
    body = {"input": "more", "previous_response_id": "resp_1a"}
    assert conversation_key({}, json.dumps(body).encode(), known) == "key"
    assert known.of_path("/v1/responses/resp_1a") == "key"
    assert known.of_path("/v1/responses/resp_2") == known.of_path("/v1/models") == ""
    body["previous_response_id"] = "resp_2"
    assert conversation_key({}, json.dumps(body).encode(), known) == key(body)
    assert not known.add(b'{"error": {}}', "key")


def test_old_responses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MOST_RESPONSES", 2)
    known = ResponseKeys()
    for number in range(3):
        known.add(b'"id":"resp_%d"' % number, "key")
    assert [known.of(f"resp_{number}") for number in range(3)] == ["", "key", "key"]
