"""Stop strings: whatever the cut into pieces, the text ends in front of the first one to be complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.writer import Scan, scan, stop_strings

letters = st.text("ab", min_size=1, max_size=3)


def literal(text: str, stops: list[str]) -> tuple[str, bool]:
    """One character at a time: the first end at which some stop string is complete, cut before the longest such."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(st.text("ab", max_size=12), st.lists(letters, max_size=3))
def test_character_by_character_it_is_the_literal_cut(text: str, stops: list[str]) -> None:
    out, hold, stopped = "", "", False
    for character in text:
        seen = scan(hold + character, stops)
        out, hold, stopped = out + seen.release, seen.hold, seen.stopped
        if stopped:
            break
    assert (out + hold, stopped) == literal(text, stops)


@given(st.text("ab", max_size=12), st.lists(letters, max_size=3))
def test_what_is_held_is_the_longest_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    seen = scan(text, stops)
    if not seen.stopped:
        assert seen.release + seen.hold == text
        begun = [end for end in range(len(text)) if any(stop.startswith(text[end:]) for stop in stops)]
        assert seen.hold == (text[begun[0] :] if begun else "")


def test_a_stop_string_inside_a_piece() -> None:
    assert scan("one\n\ntwo", ["\n\n"]) == Scan("one", "", True)


def test_no_stop_strings_hold_nothing() -> None:
    assert scan("text", []) == Scan("text", "", False)


@pytest.mark.parametrize(("given_", "known"), [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ())])
def test_one_or_several(given_: str | list[str], known: tuple[str, ...]) -> None:
    assert stop_strings(given_) == known


@pytest.mark.parametrize("bad", ["", ["a", ""], [3]])
def test_empty_ones_are_refused(bad: object) -> None:
    with pytest.raises(BadInput, match="a stop string must be text of at least one character"):
        stop_strings(bad)  # type: ignore[arg-type]
