"""Masks, forced tokens and drafts under a grammar, against the literal reading of what may follow a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from pard_onnx.models.errors import BadArtifact, BadInput, Failure
from pard_onnx.runtime.guided.grammar import Grammar
from pard_onnx.runtime.guided.matcher import FEW, Grammars, Matcher, keep_only

PROMPT = [1, 2, 3]
MORE = 40  # ids of the model that the tokenizer does not have


def sentencepiece() -> Tokenizer:
    """Byte fallback and a decoder as Llama 2's and Gemma's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "a"), ("a", "b"), ("{", '"'), ('"', ":"), ("▁", "▁"), ("ab", "ab")]
    for piece in ["▁", *map(chr, range(33, 127)), *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(piece, len(vocabulary))
    out = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    out.normalizer = normalizers.Replace(" ", "▁")
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    out.add_special_tokens(["<unk>", "<s>", "</s>"])
    return out


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer(270, "yes yesterday no nope ab abab") if request.param == "byte level" else sentencepiece()


def grammars(tokenizer: Tokenizer, more: int = MORE, ends: Sequence[int] = ()) -> Grammars:
    ids = tokenizer.get_vocab()
    eos = ids.get("<|end|>", ids.get("</s>", 0))
    return Grammars(tokenizer.to_str, "a model", len(ids) + more, ends or (eos,))


def at(tokenizer: Tokenizer, grammar: Grammar, more: int = MORE, extra: Sequence[int] = ()) -> tuple[Matcher, int, int]:
    """The matcher after PROMPT, the length of rows, and the id of EOS."""
    found = grammars(tokenizer, more)
    (eos,) = found._eos_ids
    return found.matcher(grammar, len(PROMPT), [eos, *extra]), len(tokenizer.get_vocab()) + more, eos


def allowed(matcher: Matcher, size: int, tokens: Sequence[int]) -> set[int]:
    row = matcher.edit(np.zeros(size, np.float32), tokens)
    assert set(row.tolist()) <= {0.0, -inf}
    return set(np.flatnonzero(row == 0).tolist())


choices = st.lists(st.text('aby né{"\\/\n😀', min_size=1, max_size=6), min_size=1, max_size=5, unique=True)


@settings(max_examples=30, deadline=None)
@given(choices, st.data())
def test_masks_are_what_may_follow(tokenizer: Tokenizer, texts: list[str], data: st.DataObject) -> None:
    """Of a choice: each token after which one of the texts may still come out, and EOS where one has."""
    pieces = {
        id_: tokenizer.decode([id_])
        for id_ in range(len(tokenizer.get_vocab()))
        if "\ufffd" not in tokenizer.decode([id_])
    }
    matcher, size, eos = at(tokenizer, Grammar.choice(texts))
    tokens = list(PROMPT)
    while True:
        said = tokenizer.decode(tokens[len(PROMPT) :])
        if "\ufffd" in said:  # within a character
            break
        found = allowed(matcher, size, tokens)
        assert (eos in found) == (said in texts)
        wanted = {
            id_ for id_, piece in pieces.items() if piece and any(text.startswith(said + piece) for text in texts)
        }
        forced = matcher.forced(tokens)
        if forced:  # there is one way to write what follows
            assert found == {forced[0]}
            assert wanted >= found & pieces.keys()
            assert matcher.allowed(tokens, forced) == len(forced)
        else:
            assert (found & pieces.keys()) - {eos} == wanted
        assert matcher.is_complete(tokens) == (found == {eos})
        drafts = data.draw(st.lists(st.sampled_from(sorted(pieces)), max_size=3))
        if drafts:
            assert (matcher.allowed(tokens, drafts) > 0) == (drafts[0] in wanted)
        if not found - {eos}:
            break
        tokens.append(data.draw(st.sampled_from(sorted(found - {eos}))))


@pytest.mark.parametrize("more", [0, 1, 7, 100])
def test_ids_that_the_tokenizer_does_not_have_are_forbidden(tokenizer: Tokenizer, more: int) -> None:
    known = len(tokenizer.get_vocab())
    matcher, size, _ = at(tokenizer, Grammar.regex("(?s:.*)"), more)
    found = allowed(matcher, size, PROMPT)
    assert len(found) > 100 and max(found) < known


def test_tokens_that_the_model_does_not_have_are_left_out(tokenizer: Tokenizer) -> None:
    """Added tokens past the embedding, and ids of EOS that only the model has."""
    longer = Tokenizer.from_str(tokenizer.to_str())
    size = len(longer.get_vocab())
    longer.add_tokens(["forced text"])
    unknown = size + 3
    found = Grammars(longer.to_str, "a model", size, [2]).matcher(Grammar.choice(["forced text"]), 3, [2])
    assert len(found.forced(PROMPT)) > 1
    past = Grammars(longer.to_str, "a model", unknown + 1, [2, unknown]).matcher(Grammar.regex("a?"), 3, [2, unknown])
    assert {2, unknown} < allowed(past, unknown + 1, PROMPT)


def test_an_end_that_is_text_ends_complete_texts_only(tokenizer: Tokenizer) -> None:
    digit = tokenizer.get_vocab()["1"]
    matcher, size, eos = at(tokenizer, Grammar.regex("[012]{2}"), extra=[digit])
    zero = tokenizer.get_vocab()["0"]
    assert digit not in allowed(matcher, size, PROMPT)
    assert matcher.allowed(PROMPT, [zero, digit]) == 1
    assert allowed(matcher, size, [*PROMPT, zero, zero]) == {eos, digit}


@given(st.integers(1, 6000), st.integers(0, 99))
def test_both_ways_to_keep_ids(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    row = random.normal(size=size).astype(np.float32)
    mask = random.random(size) < random.choice([0.001, 0.3, 0.9])
    kept = row.copy()
    keep_only(kept, mask)
    assert np.array_equal(kept, np.where(mask, row, -np.inf))
    assert FEW < 6000


def test_a_token_that_is_forbidden_is_a_failure(tokenizer: Tokenizer) -> None:
    matcher, _, _ = at(tokenizer, Grammar.regex("ab"))
    with pytest.raises(Failure, match="regex cannot be followed at token 3: a token that the grammar forbids"):
        matcher.read([*PROMPT, tokenizer.get_vocab()["x"]])


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ANSWERS = {
    "json": (Grammar.json_schema(SCHEMA), '{"a": 12}', "12"),
    "regex": (Grammar.regex("[0-9]{3}"), "123", "12a"),
    "choice": (Grammar.choice(["yes", "no"]), "yes", "maybe"),
    "lark": (Grammar.lark('start: "(" "x"* ")"'), "(xx)", "(y"),
}
THOUGHTS = ["", "Hm.", 'It is {"a": 1}.\n\nOr (x) or yes? 123. < / </ think>', "\n", "öäü 😀"]


@pytest.mark.parametrize("special", [True, False], ids=["token", "text"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_grammar_after_reasoning(tokenizer: Tokenizer, kind: str, special: bool) -> None:
    """Any text comes before the end of the block, and nothing but the answer after it."""
    grammar, answer, wrong = ANSWERS[kind]
    own = Tokenizer.from_str(tokenizer.to_str())
    if special:
        own.add_tokens(["<think>", "</think>"])

    found, size = grammars(own), len(own.get_vocab()) + MORE
    (eos,) = found._eos_ids

    def complete(grammar: Grammar, text: str) -> bool:
        matcher = found.matcher(grammar, len(PROMPT), [eos])
        ids, tokens = own.encode(text, add_special_tokens=False).ids, list(PROMPT)
        for id_ in ids:
            if matcher.is_complete(tokens) or id_ not in allowed(matcher, size, tokens):
                if forced := matcher.forced(tokens):  # the same text in other tokens
                    return own.decode(forced)[:1] == own.decode([id_])[:1] and kind in ("choice", "json")
                return False
            tokens.append(id_)
        return matcher.is_complete(tokens)

    begun, may = grammar.after("</think>", begun=True), grammar.after("</think>", begun=False)
    for thought in THOUGHTS:
        for space in ("", "\n\n"):
            assert complete(begun, f"{thought}</think>{space}{answer}")
            assert complete(may, f"<think>{thought}</think>{space}{answer}")
        assert not complete(begun, f"{thought}</think>{wrong}")
        assert not complete(begun, thought + answer)
    assert complete(may, answer)
    if kind != "json":  # which may begin with spaces itself
        for space in (" ", "\n"):
            assert not complete(may, space + answer)
        for before in ("</think> ", "</think>\t"):
            assert not complete(begun, before + answer)
    assert not complete(may, wrong)
    assert not complete(may, f"Hm.</think>{answer}")
    assert grammar.after("[/T]", begun=False, begin="[T]").reasoning is not None
    assert complete(grammar.after("[/T]", begun=False, begin="[T]"), f"[T]x[/T]{answer}")


def test_compiled_grammars_are_kept(tokenizer: Tokenizer) -> None:
    found = grammars(tokenizer)
    first = found.compiled(Grammar.choice(["a"]))
    assert found.compiled(Grammar.choice(["a"])) is first
    one, other = (found.matcher(Grammar.choice(["ab"]), 3, [2]) for _ in range(2))
    one.read([*PROMPT, tokenizer.get_vocab()["a"]])
    assert other.forced(PROMPT) == found.matcher(Grammar.choice(["ab"]), 3, [2]).forced(PROMPT)


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", json.dumps({"model": {"vocab": {"a": 0}, "type": "Odd"}})])
def test_a_tokenizer_that_llguidance_cannot_use(text: str) -> None:
    with pytest.raises(
        BadArtifact, match=r"^a model: llguidance cannot use this tokenizer .*generate without a grammar"
    ):
        Grammars(lambda: text, "a model", 10, [0]).compiled(Grammar.choice(["a"]))


def test_without_llguidance_the_extra_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(BadInput, match=r"needs llguidance.*pip install .*\[guided\]"):
        grammars(tokenizer).compiled(Grammar.choice(["a"]))
