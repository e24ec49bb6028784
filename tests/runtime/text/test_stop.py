"""Stop strings: whatever the cut into pieces, the text ends in front of the first one to be complete."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.writer import Detokenizer, Scan, Writer, scan, stop_strings

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
    assert scan("one\n\ntwo", ["\n\n"]) == Scan("one", "", True, "\n\n")


def test_no_stop_strings_hold_nothing() -> None:
    assert scan("text", []) == Scan("text", "", False)


@pytest.mark.parametrize(("given_", "known"), [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ())])
def test_one_or_several(given_: str | list[str], known: tuple[str, ...]) -> None:
    assert stop_strings(given_, {}).texts == known


@pytest.mark.parametrize("bad", ["", ["a", ""], [3]])
def test_empty_ones_are_refused(bad: object) -> None:
    with pytest.raises(BadInput, match="a stop string must be text of at least one character"):
        stop_strings(bad, {})  # type: ignore[arg-type]


SPECIAL = {"<s>": 0, "<t>": 1, "<s><t>": 2}
ORDINARY = "ab<>é"  # ids 3 to 7; é is two tokens, 7 and 8
TEXTS = {id_: text for text, id_ in SPECIAL.items()} | {3 + at: letter for at, letter in enumerate(ORDINARY)}


class Decoder:
    """As tokenizers decode: special tokens are left out, and half a character is the replacement character."""

    def decode(self, ids: Sequence[int]) -> str:
        return raw([id_ for id_ in ids if id_ not in SPECIAL.values()])


def raw(ids: Sequence[int]) -> str:
    """The text of tokens, special ones included."""
    out = ""
    for at, id_ in enumerate(ids):
        if id_ == 8:
            out += "" if at and ids[at - 1] == 7 else "\ufffd"
        else:
            out += "\ufffd" if id_ == 7 and ids[at + 1 : at + 2] != [8] else TEXTS[id_]
    return out


def literal_end(ids: list[int], stops: list[str]) -> tuple[str, int, set[str | None]]:
    """The text, and the number of tokens, up to the first token that completes a stop string as text or as tokens; and
    which stop strings that may be."""
    tokenized = [re.findall(r"<s><t>|<s>|<t>|.", stop) for stop in stops]
    for count in range(1, len(ids) + 1):
        atoms = [(TEXTS[id_], id_ in SPECIAL.values()) for id_ in ids[:count]]
        visible = [text for text, special in atoms if not special]
        cuts = [
            (len(visible) - len(stop), stop)
            for stop in stops
            if not atoms[-1][1] and "".join(visible).endswith(stop) and len(stop) <= len(visible)
        ]
        for stop, parts in zip(stops, tokenized, strict=True):
            wanted = [(part, part in SPECIAL) for part in parts]
            if any(special for _, special in wanted) and atoms[-len(wanted) :] == wanted:
                cuts.append((sum(not special for _, special in atoms[: -len(wanted)]), stop))
        if cuts:
            end = min(cut for cut, _ in cuts)
            return "".join(visible[:end]), count, {stop for cut, stop in cuts if cut == end}
    return "".join(TEXTS[id_] for id_ in ids if id_ not in SPECIAL.values()), len(ids), {None}


stops_with_tokens = st.lists(
    st.lists(st.sampled_from(["a", "b", "<s>", "<t>", "<s><t>"]), min_size=1, max_size=3).map("".join), max_size=3
)


@given(st.lists(st.integers(0, 6), max_size=14), stops_with_tokens)
def test_special_tokens_in_stop_strings_are_tokens(ids: list[int], stops: list[str]) -> None:
    writer = Writer(Detokenizer(Decoder(), []), stop_strings(stops, SPECIAL))
    pieces = writer.write(ids)
    text = "".join(pieces) + writer.finish()
    *wanted, named = literal_end(ids, stops)
    assert [text, len(writer.tokens)] == wanted
    assert writer.stop in named
    assert len(pieces) == len(writer.tokens) and "".join(writer.parts) == text


@given(st.lists(st.integers(0, 6), max_size=8), st.sampled_from([0, 1, 2]), stops_with_tokens)
def test_the_token_that_ends_a_generation_completes_stop_strings(ids: list[int], end: int, stops: list[str]) -> None:
    """EOS is no token of the output, but a stop string that ends in it cuts the text before it."""
    writer = Writer(Detokenizer(Decoder(), []), stop_strings(stops, SPECIAL))
    text = "".join(writer.write(ids))
    text += writer.finish(None if writer.stopped else end)
    wanted, _, named = literal_end([*ids, end], stops)
    assert text == wanted
    assert writer.stop in named


@given(st.lists(st.integers(0, 8), max_size=20))
def test_a_stop_string_that_never_comes_changes_no_text(ids: list[int]) -> None:
    texts = []
    for stops in ([], ["<s>" * 30], ["a<s>" * 10, "b" * 30]):
        writer = Writer(Detokenizer(Decoder(), []), stop_strings(stops, SPECIAL))
        writer.write(ids)
        writer.finish()
        texts.append("".join(writer.parts))
    assert len(set(texts)) == 1


def test_half_a_character_before_a_token_that_stops() -> None:
    writer = Writer(Detokenizer(Decoder(), []), stop_strings("<s>", SPECIAL))
    writer.write([3, 7, 0])
    assert ("".join(writer.parts), writer.stopped) == ("a\ufffd", True)


def test_the_earlier_cut_counts_where_one_token_completes_two_stop_strings() -> None:
    writer = Writer(Detokenizer(Decoder(), []), stop_strings(["b", "a<s>b"], SPECIAL))
    writer.write([3, 0, 4])
    assert ("".join(writer.parts), writer.stop) == ("", "a<s>b")
