"""The page in Chromium. Tests that script no reply run against a real server too (PARD_ONNX_SERVE_URL)."""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import stub_server
from stub_server import Reply, Stub, delta, finish, speculative, text

pytestmark = pytest.mark.browser


def send(page: Any, message: str) -> None:
    page.fill("#prompt", message)
    page.press("#prompt", "Enter")


def ended(page: Any, number: int = 1, state: str = "done") -> Any:
    """The reply of this number, when it has ended in this state."""
    reply = page.locator(".message.assistant").nth(number - 1)
    reply.and_(page.locator(f".{state}")).wait_for()
    return reply


def body(page: Any, number: int = 1, state: str = "done") -> str:
    return str(ended(page, number, state).locator(".body").text_content())


def kept(page: Any) -> list[dict[str, Any]]:
    """The conversations in the browser's database."""
    return page.evaluate("settle(store.database.transaction('chats').objectStore('chats').getAll(), 'onsuccess')")


def wait_until_kept(page: Any, words: str) -> None:
    """A reload may cut a write short that has just begun."""
    while words not in json.dumps(kept(page)):
        page.wait_for_timeout(50)


def gated(first: str, second: str) -> tuple[Reply, threading.Event]:
    """A reply whose second part comes when the event is set."""
    gate = threading.Event()
    return Reply((delta(content=first), gate, delta(content=second), finish())), gate


# ---- conversations


def test_a_message_gets_a_reply(page: Any) -> None:
    send(page, "Hello there")
    reply = ended(page)
    assert page.locator(".message.user .body").inner_text() == "Hello there"
    assert reply.locator(".body").text_content().strip()
    assert page.title().startswith("Hello there")
    assert page.locator("#prompt").input_value() == ""
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_reply_shows_while_it_comes(page: Any, stub: Stub) -> None:
    reply, gate = gated("The first **part** ", "and the second.")
    stub.replies.append(reply)
    send(page, "Go")
    page.locator(".message.running .body strong", has_text="part").wait_for()
    assert page.locator("#live").inner_text() == ""  # a screen reader hears no halves
    gate.set()
    assert body(page) == "The first part and the second."
    assert "The first **part** and the second." in page.locator("#live").inner_text()


def test_a_request_has_the_settings_that_were_made_and_no_others(page: Any, stub: Stub) -> None:
    send(page, "One")
    ended(page)
    plain = stub.requests[0]
    assert plain == {
        "model": "demo",
        "messages": [{"role": "user", "content": "One"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.click("#open-settings")
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 99, "seed": 7}
    for name, value in given.items():
        page.fill(f"[name={name}]", str(value))
    page.select_option("[name=draft_length]", "16")
    page.fill("[name=system]", "Be short.")
    page.click("#settings >> text=Done")
    page.select_option("#model", stub.models[1])
    page.reload()
    send(page, "Two")
    ended(page, 2)
    request = stub.requests[1]
    assert given.items() <= request.items()
    assert request["draft_length"] == 16
    assert request["model"] == stub.models[1]
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "user"]
    page.click("#open-settings")
    page.select_option("[name=draft_length]", "auto")
    page.fill("[name=top_p]", "1.5")  # out of range: what was there stays
    page.locator("[name=top_p]").blur()
    page.press("[name=top_p]", "Escape")
    send(page, "Three")
    ended(page, 3)
    assert stub.requests[2]["draft_length"] == "auto"
    assert stub.requests[2]["top_p"] == 0.9


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_a_reply_stops(page: Any, stub: Stub, by: str) -> None:
    stub.replies.append(Reply((delta(content="As far as this"), *[0.05, delta(content=".")] * 400)))
    send(page, "Go")
    page.locator(".message.running .body", has_text="As far").wait_for()
    if by == "button":
        page.click("[aria-label=Stop]")
    else:
        page.keyboard.press("Escape")
    assert body(page, state="stopped").startswith("As far as this")
    page.locator(".note", has_text="Stopped.").wait_for()
    send(page, "Go on")
    ended(page, 2)
    assert [message["role"] for message in stub.requests[1]["messages"]] == ["user", "assistant", "user"]
    while not stub.disconnects:
        page.wait_for_timeout(20)


def test_a_reply_is_written_again(page: Any, stub: Stub) -> None:
    stub.replies += [text("First."), text("Second.")]
    send(page, "Go")
    assert body(page) == "First."
    page.click("text=Regenerate")
    page.locator(".message.assistant .body", has_text="Second.").wait_for()
    assert page.locator(".message").count() == 2
    assert stub.requests[0] == stub.requests[1]


def test_an_edited_message_cuts_what_follows(page: Any, stub: Stub) -> None:
    stub.replies += [text("A."), text("B."), text("C.")]
    send(page, "One")
    ended(page, 1)
    send(page, "Two")
    ended(page, 2)
    page.locator("text=Edit").first.click()
    page.fill(".editor textarea", "Another")
    page.press(".editor textarea", "Escape")
    assert page.locator(".message").count() == 4
    page.locator("text=Edit").first.click()
    page.fill(".editor textarea", "One, better")
    page.press(".editor textarea", "Enter")
    page.locator(".body", has_text="C.").wait_for()
    assert page.locator(".message").count() == 2
    assert stub.requests[2]["messages"] == [{"role": "user", "content": "One, better"}]


def test_conversations_survive_a_reload(page: Any) -> None:
    send(page, "Remember **this**")
    said = body(page)
    wait_until_kept(page, '"state": "done"')
    page.reload()
    assert page.locator(".message.user .body").inner_text() == "Remember **this**"
    assert body(page) == said
    page.keyboard.press("Control+k")
    assert page.locator("#welcome").is_visible()
    page.locator("#chats .open", has_text="Remember").click()
    assert body(page) == said


def test_a_reload_keeps_what_had_come(page: Any, stub: Stub) -> None:
    reply, gate = gated("Half of it", "")
    stub.replies.append(reply)
    send(page, "Go")
    page.locator(".message.running .body", has_text="Half").wait_for()
    wait_until_kept(page, "Half of it")
    page.reload()
    assert body(page, state="interrupted") == "Half of it"
    gate.set()


def test_two_conversations_run_at_once(page: Any, stub: Stub) -> None:
    reply, gate = gated("Slow ", "reply.")
    stub.replies += [reply, text("Quick reply.")]
    send(page, "Slow one")
    page.locator(".message.running .body", has_text="Slow").wait_for()
    page.keyboard.press("Control+k")
    send(page, "Quick one")
    assert body(page) == "Quick reply."
    gate.set()
    page.locator("#chats .open", has_text="Slow one").click()
    assert body(page) == "Slow reply."


def test_conversations_are_renamed_exported_and_deleted(page: Any, stub: Stub, tmp_path: Path) -> None:
    stub.replies.append(text("Some *text*.", size=3))
    send(page, "Hello / world")
    ended(page)
    page.click("#chats .more")
    for label, suffix in (("Export Markdown", "md"), ("Export JSON", "json")):
        with page.expect_download() as download:
            page.click(f"text={label}")
        assert download.value.suggested_filename == f"Hello-world.{suffix}"
        download.value.save_as(tmp_path / f"chat.{suffix}")
    written = (tmp_path / "chat.md").read_text("utf-8")
    assert written == "# Hello / world\n\n## You\n\nHello / world\n\n## Reply\n\nSome *text*.\n"
    exported = json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert [message["content"] for message in exported["messages"]] == ["Hello / world", "Some *text*."]
    page.fill("#chat-name", "<b>Another</b> name")
    page.press("#chat-name", "Enter")
    page.locator("#chats .open", has_text="<b>Another</b> name").wait_for()
    wait_until_kept(page, "<b>Another</b> name")
    page.reload()
    page.click("#chats .more")
    page.click("#delete")
    page.locator("#delete", has_text="Delete for good?").click()
    page.locator("#welcome").wait_for()
    assert page.locator("#chats li").count() == 0
    page.reload()
    assert kept(page) == []


def test_full_storage_is_said_and_stops_nothing(page: Any, stub: Stub) -> None:
    page.evaluate(
        "() => { IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); } }"
    )
    stub.replies.append(text("Still here."))
    send(page, "Go")
    assert body(page) == "Still here."
    page.locator("#notice", has_text="storage is full").wait_for()


def test_a_browser_without_storage_still_chats(page: Any, stub: Stub) -> None:
    blocked = "() => { throw new DOMException('no', 'SecurityError'); }"
    page.add_init_script(
        f"for (const name of ['localStorage', 'sessionStorage'])"
        f"  Object.defineProperty(window, name, {{get: {blocked}}});"
        f"IDBFactory.prototype.open = {blocked};"
    )
    page.reload()
    page.locator("#notice", has_text="keeps no conversations").wait_for()
    stub.replies.append(text("Works."))
    send(page, "Go")
    assert body(page) == "Works."


def test_another_tab_sees_what_this_one_writes(page: Any, stub: Stub) -> None:
    other = page.context.new_page()
    other.goto(stub.url)
    stub.replies += [text("One."), text("Two.")]
    send(page, "From the first tab")
    ended(page)
    other.locator("#chats .open", has_text="From the first tab").click()
    assert body(other) == "One."
    other.fill("#prompt", "half a message")
    send(page, "More")
    ended(page, 2)
    assert body(other, 2) == "Two."
    assert other.input_value("#prompt") == "half a message"


# ---- what speculation did


def test_draft_tokens_and_rounds_are_shown(page: Any, stub: Stub, tmp_path: Path) -> None:
    stub.replies.append(speculative("one two three four five six seven eight nine ten eleven twelve", "Some thought."))
    send(page, "Go")
    reply = ended(page)
    assert re.search(r"12 tokens · 21\d\.\d tokens/s · \d\.\d\d accepted per round", reply.inner_text())
    assert not reply.locator("details").get_attribute("open")
    reply.locator("summary").click()
    reply.locator("text=Some thought.").wait_for()
    page.click("#tokens")
    spans = reply.locator(".tokens span")
    assert "".join(spans.all_text_contents()).startswith("one two three four")
    assert reply.locator(".tokens .a").all_text_contents()[:3] == ["one", " two", " three"]
    page.click(".foot >> text=Rounds")
    assert page.locator("#summary").inner_text().startswith("3 rounds:")
    assert page.locator("#picture svg").get_attribute("aria-label") == page.locator("#summary").inner_text()
    with page.expect_download() as download:
        page.click("text=Save as SVG")
    download.value.save_as(tmp_path / "rounds.svg")
    assert (tmp_path / "rounds.svg").read_text("utf-8").startswith("<svg xmlns=")
    page.click("#timeline >> text=Close")
    page.click("#tokens")
    assert reply.locator(".body p").text_content().endswith("twelve")


@pytest.mark.skipif(not os.environ.get("PARD_ONNX_SERVE_URL"), reason="asks what pard-serve sends")
def test_what_pard_serve_tells_of_speculation_is_shown(page: Any) -> None:
    send(page, "Write a function that adds two numbers")
    reply = ended(page)
    pattern = r"[1-9]\d* tokens · [1-9]\d*\.\d tokens/s · [1-9]\d*\.\d\d accepted per round"
    assert re.search(pattern, reply.locator(".stats").inner_text())
    page.click("#tokens")
    spans = reply.locator(".tokens span")
    assert f"{spans.count()} tokens" in reply.locator(".stats").inner_text()
    assert reply.locator(".tokens .a").count()
    page.click(".foot >> text=Rounds")
    assert re.match(r"[1-9]\d* rounds?: \d+ ms of drafting, \d+ ms of verifying", page.locator("#summary").inner_text())


def test_a_server_without_the_extension_shows_none_of_it(page: Any, stub: Stub) -> None:
    stub.replies.append(Reply((delta(content="Plain."), finish(tokens=3))))
    send(page, "Go")
    assert "tokens/s" not in ended(page).inner_text()
    assert not page.locator("#tokens").is_visible()
    assert page.locator(".foot >> text=Rounds").count() == 0


def test_an_answer_in_one_piece_is_read_too(page: Any, stub: Stub) -> None:
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            json={"choices": [{"message": {"content": "All at once."}, "finish_reason": "stop"}]}
        ),
    )
    send(page, "Go")
    assert body(page) == "All at once."


def test_tool_calls_are_shown(page: Any, stub: Stub) -> None:
    parts = [
        {"index": 0, "function": {"name": "look_up", "arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    ]
    stub.replies.append(Reply((*(delta(tool_calls=[part]) for part in parts), finish("tool_calls"))))
    send(page, "Go")
    reply = ended(page)
    reply.locator("summary", has_text="Tool call: look_up").click()
    assert reply.locator("pre").inner_text() == '{"a": 1}'


# ---- errors


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Any, stub: Stub) -> None:
    page.locator("#model option", has_text="demo").wait_for(state="attached")
    stub.key = "secret"
    stub.replies.append(text("Let in."))
    send(page, "Go")
    for key in ("wrong", "secret"):
        page.locator("#key-dialog[open]").wait_for()
        page.fill("#key", key)
        page.press("#key", "Enter")
        while key == "wrong" and page.input_value("#key"):  # until it is asked for again
            page.wait_for_timeout(20)
    assert body(page) == "Let in."
    page.reload()
    page.locator("#model option", has_text="demo").wait_for(state="attached")
    assert "secret" not in page.evaluate("JSON.stringify({...localStorage})") + json.dumps(kept(page))


def test_without_a_key_the_refusal_is_shown(page: Any, stub: Stub) -> None:
    stub.key = "secret"
    page.reload()
    page.click("#no-key")
    page.locator("#notice", has_text="Send an API key.").wait_for()
    send(page, "Go")
    page.click("#no-key")
    assert "Send an API key." in ended(page, state="failed").inner_text()


def test_a_busy_server_is_asked_again(page: Any, stub: Stub) -> None:
    busy = Reply(status=503, error="The queue is full.", headers=(("Retry-After", "1"),))
    stub.replies += [busy, text("At last.")]
    send(page, "Go")
    page.locator(".note", has_text="The queue is full. Trying again in 1 s.").wait_for()
    assert body(page) == "At last."
    assert page.locator(".message .note").count() == 0
    stub.replies.append(Reply(status=503, error="The queue is full.", headers=(("Retry-After", "60"),)))
    send(page, "Once more")
    page.locator(".note", has_text="Trying again in 60 s.").wait_for()
    page.keyboard.press("Escape")
    ended(page, 2, "stopped")


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_an_error_is_shown_and_can_be_tried_again(page: Any, stub: Stub, status: int) -> None:
    stub.replies += [Reply(status=status, error="No <b>such</b> luck."), text("Now.")]
    send(page, "Go")
    assert ended(page, state="failed").locator("[role=alert]").inner_text() == "No <b>such</b> luck."
    page.click("text=Try again")
    assert body(page) == "Now."


def test_after_an_error_no_two_messages_of_one_role_follow_each_other(page: Any, stub: Stub) -> None:
    stub.replies += [Reply(status=500, error="No."), text("Yes.")]
    send(page, "One")
    ended(page, state="failed")
    send(page, "Two")
    ended(page, 2)
    assert stub.requests[1]["messages"] == [{"role": "user", "content": "One\n\nTwo"}]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (Reply((delta(content="Half"), 0.1), cut=True), "The connection ended before the reply did"),
        (Reply((delta(content="Half"),)), ""),  # [DONE] without a reason to end is an end
        (Reply((delta(content="Half"), {"error": {"message": "Out of memory."}})), "Out of memory."),
        (Reply((delta(content="Half"), {"error": "?"})), "The server reports an error."),
    ],
)
def test_a_reply_that_breaks_off_keeps_its_text(page: Any, stub: Stub, end: Reply, message: str) -> None:
    stub.replies.append(end)
    send(page, "Go")
    assert body(page, state="failed" if message else "done") == "Half"
    alerts = page.locator(".message [role=alert]").all_inner_texts()
    assert message in "".join(alerts)
    assert len(alerts) == bool(message)


def test_a_line_that_is_no_json_is_counted(page: Any, stub: Stub) -> None:
    lines = (
        b': a comment\n\ndata: {"choices": [{"del\n\nevent: x\r\n'
        b'data: {"choices": [{"delta":\r\ndata: {"content": "B"}}]}\r\n\r\n'
    )
    stub.replies.append(Reply((delta(content="A"), lines, delta(content="C"), finish())))
    send(page, "Go")
    assert body(page) == "ABC"
    page.locator(".note", has_text="1 part of the reply could not be read.").wait_for()


ODD = [None, 5, -1, 1e308, "text", [], {}, [None], [[5]], {"message": 5}, True]


def test_chunks_of_any_shape_do_no_harm(page: Any, stub: Stub) -> None:
    chunks: list[Any] = [*ODD]
    chunks += [{name: odd} for name in ("choices", "usage", "pard") for odd in ODD]
    chunks += [{"choices": [odd]} for odd in ODD]
    chunks += [
        delta(**{name: odd}) for name in ("content", "reasoning_content", "tool_calls") for odd in ODD if odd != "text"
    ]
    chunks += [{"choices": [{"delta": {"content": ""}, "finish_reason": odd}]} for odd in ODD if odd != "text"]
    names = ("accepted", "pieces", "tokens_per_second", "mean_accepted", "drafted", "round")
    chunks += [{"pard": {name: odd}} for name in names for odd in ODD]
    chunks += [
        {"pard": {"round": {"verify_ms": 1, name: odd}}} for name in ("draft_ms", "proposed", "matched") for odd in ODD
    ]
    events = tuple(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks)
    stub.replies.append(Reply((*events, delta(content="Still here."), finish())))
    send(page, "Go")
    assert body(page) == "Still here."
    page.click(".foot >> text=Rounds")
    page.locator("#picture svg").wait_for()
    wait_until_kept(page, '"state": "done"')
    page.reload()
    assert body(page) == "Still here."


def test_a_server_that_was_away_is_found_again(page: Any, stub: Stub) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    page.route("**/health", lambda route: route.abort())
    send(page, "Go")
    assert "cannot be reached" in ended(page, state="failed").inner_text()
    page.locator("#notice", has_text="looks for it again").wait_for()
    page.unroute("**/v1/**")
    page.unroute("**/health")
    page.locator("#notice").wait_for(state="hidden")
    page.click("text=Try again")
    ended(page)


# ---- the page itself


def test_keys(page: Any, stub: Stub) -> None:
    stub.replies.append(text("Yes."))
    page.locator("#prompt").press_sequentially("one")
    page.press("#prompt", "Shift+Enter")
    page.locator("#prompt").press_sequentially("two")
    page.dispatch_event("#prompt", "keydown", {"key": "Enter", "isComposing": True})
    assert page.locator(".message").count() == 0
    page.press("#prompt", "Enter")
    ended(page)
    assert stub.requests[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Control+k")
    page.keyboard.press("Enter")  # an empty message is none
    assert page.locator("#welcome").is_visible()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.matches('#ideas button')")


def test_a_narrow_window(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    send(page, "Go")
    ended(page)
    for element in ("document.documentElement", "document.getElementById('log')"):
        assert page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth")
    assert not page.locator("#new").is_visible()
    page.click("#menu")
    assert page.evaluate("document.activeElement.id") == "new"
    page.keyboard.press("Escape")
    page.locator("#new").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "menu"
    page.click("#menu")
    page.click("#new")
    page.locator("#welcome").wait_for()
    assert page.locator("#menu").get_attribute("aria-expanded") == "false"


def test_the_theme_is_chosen_and_kept(page: Any) -> None:
    def colour() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="dark")
    dark = colour()
    page.emulate_media(color_scheme="light")
    assert colour() != dark
    page.click("#theme")  # light
    page.click("#theme")  # dark
    page.reload()
    assert page.locator("#theme").get_attribute("aria-label") == "Theme: dark"
    assert colour() == dark


def test_reading_above_is_not_disturbed_by_new_text(page: Any, stub: Stub) -> None:
    gate = threading.Event()
    stub.replies.append(Reply((delta(content="Line.\n\n" * 80), gate, delta(content="More.\n\n" * 80), finish())))
    send(page, "Go")
    page.locator(".message.running .body p").nth(70).wait_for(state="attached")
    page.evaluate("document.getElementById('log').scrollTop = 0")
    gate.set()
    ended(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0
    page.click("#latest")
    assert page.evaluate("atEnd()")


def audit(page: Any, axe: str) -> list[str]:
    """What axe-core finds that is serious or critical."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    return [
        f"{each['id']}: {node['html']} {node['any'] and node['any'][0]['message']}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious(page: Any, axe: str, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 700})
    assert audit(page, axe) == []
    send(page, "Compare the two in a table")
    ended(page)
    page.locator("text=Edit").click()
    assert audit(page, axe) == []
    page.click(".editor >> text=Cancel")
    if page.locator("#tokens").is_visible():
        page.click("#tokens")
        assert audit(page, axe) == []
        page.click(".foot >> text=Rounds")
        assert audit(page, axe) == []
        page.keyboard.press("Escape")
    page.click("#open-settings")
    assert audit(page, axe) == []


def test_the_scripted_reply_is_the_demo(page: Any, stub: Stub) -> None:
    send(page, "Go")
    reply = ended(page)
    assert reply.locator("table tbody tr").count() == 3
    assert reply.locator("pre .k", has_text="def").count() == 1
    assert stub_server.DEMO.count("```") == 2
