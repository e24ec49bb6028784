"""What all answers of /v1/responses must be: OpenAI's own types, and events in the documented order."""

from __future__ import annotations

import json
from typing import Any, get_args

from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent

OWN = {"pard", "timings", "store"}  # fields of a response that openai's type does not have
TYPES = {get_args(one.model_fields["type"].annotation)[0]: one for one in get_args(get_args(ResponseStreamEvent)[0])}
LAST = ("response.completed", "response.incomplete", "response.failed")


def require_response(value: Any) -> Response:
    """The response as openai's type, without any coercion."""
    found = Response.model_validate_json(json.dumps(value), strict=True)
    assert set(found.model_extra or ()) <= OWN
    return found


def require_event(value: Any) -> Any:
    """The event as openai's type of its name."""
    found = TYPES[value["type"]].model_validate_json(json.dumps(value), strict=True)
    assert not found.model_extra
    return found


def require_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event's response, after events of which each has its place. The deltas are the items."""
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for number, value in enumerate(events):
        assert value["sequence_number"] == number
        event = require_event(value)
        if value["type"] != "response.completed":
            state.handle_event(event)
    names = [value["type"] for value in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in LAST
    assert len([name for name in names if name in LAST]) == 1
    first, last = events[0]["response"], events[-1]["response"]
    require_response(last)
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert last["status"] == names[-1].removeprefix("response.")
    changed = {"status", "output", "usage", "completed_at", "incomplete_details", "error"}
    assert {name: value for name, value in first.items() if name not in changed}.items() <= last.items()
    if names[-1] != "response.failed":
        assert items_of(events[2:-1]) == last["output"]
    return last


def items_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events tell of, one after the other."""
    items: list[dict[str, Any]] = []
    rest = [*events]
    while rest:
        item, rest = next_item(len(items), rest)
        items.append(item)
    return items


def next_item(index: int, events: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first item, and the events after it."""
    added, *rest = events
    assert (added["type"], added["output_index"]) == ("response.output_item.added", index)
    item = added["item"]
    assert item["status"] == "in_progress"
    end = next(place for place, event in enumerate(rest) if event["type"] == "response.output_item.done")
    inner, done = rest[:end], rest[end]["item"]
    assert all(event["output_index"] == index and event["item_id"] == item["id"] for event in inner)
    assert rest[end]["output_index"] == index
    names = [event["type"] for event in inner]
    deltas = "".join(event.get("delta", "") for event in inner)
    if item["type"] == "function_call":
        assert names == ["response.function_call_arguments.delta"] * (len(names) - 1) + [
            "response.function_call_arguments.done"
        ]
        assert done == {**item, "arguments": deltas, "status": done["status"]}
        assert inner[-1]["arguments"] == deltas
        return done, rest[end + 1 :]
    kind = {"message": "output_text", "reasoning": "reasoning_text"}[item["type"]]
    assert names[0] == "response.content_part.added"
    assert names[-2:] == [f"response.{kind}.done", "response.content_part.done"]
    assert set(names[1:-2]) <= {f"response.{kind}.delta"}
    assert all(event["content_index"] == 0 for event in inner)
    (part,) = done["content"]
    assert part == inner[-1]["part"]
    assert inner[0]["part"] == {**part, "text": "", **({"logprobs": []} if kind == "output_text" else {})}
    assert inner[-2]["text"] == deltas == part["text"]
    if kind == "output_text":
        assert inner[-2]["logprobs"] == part["logprobs"]
        assert [one for event in inner[1:-2] for one in event["logprobs"]] == part["logprobs"]
    assert {**item, "content": done["content"], "status": done["status"]} == done
    return done, rest[end + 1 :]
