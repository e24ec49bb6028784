"""Structured output on the shipped pair: always valid, and always the text of plain decoding under the same grammar."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from json_schemas import SCHEMAS, closed
from jsonschema import Draft202012Validator

from pard_onnx import Chunk, Failure, Pair, load
from pard_onnx.generate_command import main as generate_main
from pard_onnx.models import demo
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.decoding.drafter import Drafter, Proposal
from pard_onnx.runtime.options import Options

PROMPT = demo.prompts()[0]
MOST = 120  # tokens
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 8},
}
FAST = ("nested objects", "numbers with bounds", "a recursive reference", "alternatives", "a bare integer")


@pytest.fixture(scope="module")
def pairs(demo_folder: Callable[[str, str], Path]) -> Iterator[dict[str, Pair]]:
    target, draft = demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")
    with load(target, draft) as pard, load(target) as alone:
        yield {"pard": pard, "alone": alone}


def whole(result: Any) -> tuple[Any, ...]:
    return result.tokens, result.text, result.finish_reason


def check(pairs: dict[str, Pair], name: str, sampling: str, lengths: Sequence[int | str]) -> None:
    schema = SCHEMAS[name]
    options = {"response_format": schema, "max_new_tokens": MOST, **SAMPLINGS[sampling]}
    plain = pairs["alone"].generate(PROMPT, draft_length=0, **options)
    if plain.finish_reason == "stop":
        Draft202012Validator(schema).validate(json.loads(plain.text))
    for which, length in product(pairs, lengths):
        found = pairs[which].generate(PROMPT, draft_length=length, **options)
        assert whole(found) == whole(plain), (which, length)


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
@pytest.mark.parametrize("name", FAST)
def test_json_is_valid_and_that_of_plain_decoding(pairs: dict[str, Pair], name: str, sampling: str) -> None:
    check(pairs, name, sampling, [4, "auto"])


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_of_all_schemas_and_draft_lengths(pairs: dict[str, Pair], name: str, sampling: str) -> None:
    check(pairs, name, sampling, [0, 1, 4, 8, "auto"])


def test_most_schemas_are_completed(pairs: dict[str, Pair]) -> None:
    """So that the validity above says something. A seed's text is the same on every machine with the same kernels."""
    ended = [
        pairs["pard"].generate(PROMPT, response_format=schema, max_new_tokens=300, temperature=0.8, seed=1)
        for schema in SCHEMAS.values()
    ]
    for result, schema in zip(ended, SCHEMAS.values(), strict=True):
        if result.finish_reason == "stop":
            Draft202012Validator(schema).validate(json.loads(result.text))
    assert sum(result.finish_reason == "stop" for result in ended) > 0.7 * len(ended)


class Garbage(Drafter):
    """Proposes random ids, those that end texts and control tokens included; now and then the right text."""

    def __init__(self, size: int, right: Sequence[int], ends: Sequence[int]) -> None:
        self._random, self._size, self._right, self._ends = Random(4), size, right, ends

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        draw = self._random
        ids = [draw.choice([draw.randrange(self._size), *self._ends]) for _ in range(k)]
        if draw.random() < 0.6:
            right = [*self._right[len(committed) :], *self._ends][: draw.randrange(k + 1)]
            ids[: len(right)] = right
        return Proposal(tuple(ids), (0.5,) * len(ids), "garbage")


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
@pytest.mark.parametrize("name", ["nested objects", "alternatives"])
def test_a_drafter_that_proposes_garbage_changes_no_text(pairs: dict[str, Pair], name: str, sampling: str) -> None:
    engine = pairs["alone"].engine
    vocabulary = engine.target_manifest.spec.vocabulary

    def run(right: Sequence[int] | None) -> tuple[list[int], Any, int]:
        keywords = {"response_format": SCHEMAS[name], "max_new_tokens": MOST, "draft_length": 0 if right is None else 6}
        sequence = engine.new_sequence()
        sequence.continue_with(pairs["alone"].encode(PROMPT))
        make = None if right is None else lambda *_: Garbage(vocabulary.size, right, vocabulary.eos_ids)
        options = Options.from_keywords({**keywords, **SAMPLINGS[sampling]})
        steps = list(engine.run(sequence, options, seed=3, make_drafter=make))
        return sequence.tokens, (steps[-1].finish_reason, steps[-1].end), sum(step.matched for step in steps)

    plain, ended, _ = run(None)
    tokens, end, matched = run(plain)
    assert tokens == plain
    assert end == ended
    assert matched, "no draft was accepted"


@pytest.mark.parametrize("length", [0, 4, "auto"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2,4}"}, "[a-c]{3}-[0-9]{2,4}"),
        ({"regex": "(foo|bär)/\\w{1,3}"}, "(foo|bär)/\\w{1,3}"),
        ({"choice": ["yes", "no", "yesterday", 'a "quoted" one\n']}, 'yes|no|yesterday|a "quoted" one\n'),
        ({"grammar": 'start: "(" ITEM ("," ITEM)~0..2 ")"\nITEM: /[a-z]{1,2}/'}, r"\([a-z]{1,2}(,[a-z]{1,2}){0,2}\)"),
    ],
    ids=["regex", "regex with letters", "choice", "lark"],
)
def test_other_grammars(pairs: dict[str, Pair], options: dict[str, Any], wanted: str, length: int | str) -> None:
    for sampling in ({}, {"temperature": 1.5, "seed": 2}):
        found = pairs["pard"].generate(PROMPT, draft_length=length, max_new_tokens=40, **options, **sampling)
        assert found.finish_reason == "stop"
        assert re.fullmatch(wanted, found.text)
        assert whole(found) == whole(pairs["alone"].generate(PROMPT, draft_length=0, **options, **sampling))


def test_a_complete_text_ends_without_another_step(pairs: dict[str, Pair]) -> None:
    for length in (0, 4):
        found = pairs["pard"].generate(PROMPT, regex="abc", draft_length=length, max_new_tokens=50)
        assert (found.text, found.finish_reason) == ("abc", "stop")
        assert found.stats.rounds < len(found.tokens) or len(found.tokens) == 1
    exactly = pairs["pard"].generate(PROMPT, regex="abc", draft_length=0, max_new_tokens=len(found.tokens))
    assert whole(exactly) == whole(found), "complete at the last token that is allowed"


def test_forced_tokens_are_drafts(pairs: dict[str, Pair]) -> None:
    """With a target alone, too, but not in plain decoding."""
    schema = closed(a_long_name_that_is_forced={"type": "boolean"}, another_one_of_them={"type": "boolean"})
    for which in pairs:
        plain = pairs[which].generate(PROMPT, response_format=schema, draft_length=0)
        assert set(plain.stats.sources) == {"none"}
        found = pairs[which].generate(PROMPT, response_format=schema, draft_length=8)
        assert "grammar" in found.stats.sources
        assert found.stats.rounds < 0.6 * plain.stats.rounds
        assert whole(found) == whole(plain)


@pytest.mark.parametrize("length", [0, 5])
def test_a_text_that_is_cut_is_a_beginning(pairs: dict[str, Pair], length: int) -> None:
    options: dict[str, Any] = {"response_format": SCHEMAS["nested objects"], "draft_length": length}
    text = pairs["pard"].generate(PROMPT, **options).text
    cut = pairs["pard"].generate(PROMPT, max_new_tokens=5, **options)
    assert cut.finish_reason == "length"
    assert text.startswith(cut.text)
    stopped = pairs["pard"].generate(PROMPT, stop='"addr', **options)
    assert (stopped.text, stopped.finish_reason) == (text[: text.index('"addr')], "stop")


def test_ids_of_the_users_end_a_text_only_where_it_is_complete(pairs: dict[str, Pair]) -> None:
    pair = pairs["pard"]
    (digit,) = pair.encode("1")
    for length in (0, 4):
        found = pair.generate(
            PROMPT, regex="[01]{4}", stop_token_ids=[digit], draft_length=length, logit_bias={digit: 99}
        )
        assert found.text == "0000"


@pytest.mark.parametrize("length", [0, 4, "auto"])
def test_a_bias_that_contradicts_is_a_failure(pairs: dict[str, Pair], length: int | str) -> None:
    pair = pairs["pard"]
    ban = {token: -float("inf") for text, token in pair.text.vocabulary().items() if "z" in text}
    with pytest.raises(Failure, match=r"no id is left for position .*grammar"):
        pair.generate(PROMPT, regex="az", logit_bias=ban, draft_length=length)
    assert pair.generate(PROMPT, regex="a[yz]", logit_bias=ban, draft_length=length).text == "ay"


ENDLESS: tuple[dict[str, Any], ...] = (
    {"regex": "(ab|[xy]{2,9})[0-9]"},
    {"choice": ["the fox", "the fox jumps", "b"]},
    {"grammar": 'start: "q" | "qr"'},
)


@pytest.fixture(scope="module")
def endless(demo_folder: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The shipped pair, whose target's manifest names no EOS."""
    target = tmp_path_factory.mktemp("endless") / "target"
    shutil.copytree(demo_folder("demo-target", "int4"), target)
    manifest = Manifest.read(target)
    spec = replace(manifest.spec, vocabulary=replace(manifest.spec.vocabulary, eos_ids=()))
    replace(manifest, spec=spec).write(target)
    with load(target, demo_folder("demo-draft", "int8")) as pair:
        yield pair


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("options", ENDLESS, ids=repr)
@pytest.mark.parametrize("length", [1, 8, "auto"])
def test_a_model_without_eos(endless: Pair, options: dict[str, Any], sampling: str, length: int | str) -> None:
    """It cannot end a text that may go on; a text after which nothing may follow ends by itself."""
    given: dict[str, Any] = {**options, **SAMPLINGS[sampling], "max_new_tokens": 30}
    plain = endless.generate(PROMPT, draft_length=0, **given)
    assert plain.finish_reason == "stop"
    assert whole(endless.generate(PROMPT, draft_length=length, **given)) == whole(plain)


@pytest.mark.parametrize("options", [{"regex": "(ab|cd)[0-9]"}, {"choice": ["hello", "x"]}], ids=repr)
@pytest.mark.parametrize("length", [0, 4, "auto"])
def test_a_bias_that_bans_eos_changes_no_complete_text(
    pairs: dict[str, Pair], options: dict[str, Any], length: int | str
) -> None:
    pair = pairs["pard"]
    ban = dict.fromkeys(pair.target_manifest.spec.vocabulary.eos_ids, -float("inf"))
    expected = pair.generate(PROMPT, draft_length=0, **options)
    assert whole(pair.generate(PROMPT, draft_length=length, logit_bias=ban, **options)) == whole(expected)


def test_a_chat_goes_on_after_a_guided_turn(pairs: dict[str, Pair]) -> None:
    turns: list[list[str]] = []
    for length in (0, 4):
        chat = pairs["pard"].chat()
        first = chat.send("Is it so?", choice=["yes", "no"], draft_length=length)
        second = chat.send("Write.", max_new_tokens=12, draft_length=length)
        third = chat.send("And?", regex="[0-9]{3}", draft_length=length)
        assert first.text in ("yes", "no")
        assert re.fullmatch("[0-9]{3}", third.text)
        assert third.stats.cached_tokens > 10
        turns.append([first.text, second.text, third.text])
    assert turns[0] == turns[1]


def test_chunks_are_the_text(pairs: dict[str, Pair]) -> None:
    chunks: list[Chunk] = []
    with pairs["pard"].stream(PROMPT, response_format=SCHEMAS["enums"], draft_length=6) as stream:
        chunks.extend(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    assert any(any(chunk.drafted) for chunk in chunks)


def test_by_command(
    demo_folder: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, lark = tmp_path / "schema ü.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(SCHEMAS["enums"]), encoding="utf-8")
    lark.write_text('\ufeffstart: "a" | "é"', encoding="utf-8")
    models = ["--target", str(demo_folder("demo-target", "int4")), "--draft", str(demo_folder("demo-draft", "int8"))]

    def text(*options: str) -> str:
        assert generate_main([*models, "--prompt", PROMPT, *options]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    for given in (str(schema), schema.read_text(encoding="utf-8")):
        Draft202012Validator(SCHEMAS["enums"]).validate(json.loads(text("--json-schema", given)))
    assert re.fullmatch("[xy]{3}", text("--regex", "[xy]{3}"))
    assert text("--choice", "yes", "--choice", "no") in ("yes", "no")
    assert text("--grammar", str(lark)) in ("a", "é")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "{"], "--json-schema '{': not JSON"),
        (["--json-schema", "nowhere.json"], "--json-schema nowhere.json: the file cannot be read"),
        (["--grammar", "nowhere.lark"], "--grammar nowhere.lark: the file cannot be read"),
        (["--regex", ""], "regex must be a regular expression"),
        (["--choice", ""], "each choice must be text"),
    ],
    ids=str,
)
def test_what_commands_refuse_before_a_model_is_opened(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_main(["--target", "no such folder", "--prompt", "x", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
