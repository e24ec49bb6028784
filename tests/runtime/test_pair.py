"""The public face on toy artifacts: losslessness, ends of generation, refusals, one call at a time."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

import pard_onnx
from pard_onnx import BadArtifact, BadInput, BadProvider, Failure, Pair, Result, TooLong, load
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.text.prompt import Prompt
from pard_onnx.runtime.tuning.steps import EVEN, Widths

PROMPTS: list[Prompt] = ["the quick brown fox", "é", [1, 2, 3], [{"role": "user", "content": "lazy dog"}]]
TEXT = "the quick brown"


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(pair_folders: tuple[Path, Path]) -> Pair:
    return load(target=pair_folders[0], threads=1)


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 32])
@pytest.mark.parametrize("exact", [True, False])
def test_pard_gives_plain_tokens(pair: Pair, plain: Pair, prompt: Prompt, k: int, exact: bool) -> None:
    expected = plain.generate(prompt, max_new_tokens=40, exact=exact, draft_length=0)
    result = pair.generate(prompt, max_new_tokens=40, draft_length=k, exact=exact)
    assert (result.tokens, result.text, result.finish_reason) == (expected.tokens, expected.text, "length")
    assert result.stats.mean_accepted > 1.5
    assert expected.stats.mean_accepted == 1


def set_widths(opened: Pair, widths: Widths | None) -> None:
    """As if these had been measured."""
    target, draft = opened.engine.models
    opened.engine._models = replace(target, tuning=replace(target.tuning, widths=widths)), draft


@pytest.mark.parametrize("widths", [EVEN, Widths(4, 4)])
def test_exact_steps_have_the_widths_that_were_proven(
    pair_folders: tuple[Path, Path], plain: Pair, widths: Widths, monkeypatch: pytest.MonkeyPatch
) -> None:
    for opened in (load(*pair_folders, threads=1), load(pair_folders[0], threads=1)):
        set_widths(opened, widths)
        session, seen = opened.engine.models[0].session, []
        step = session.step
        monkeypatch.setattr(session, "step", lambda ids, keep, s=step, w=seen: w.append(len(ids)) or s(ids, keep))
        result = opened.generate(TEXT, max_new_tokens=40)
        assert result.tokens == plain.generate(TEXT, max_new_tokens=40).tokens
        assert (result.stats.exact, result.stats.widths) == (True, widths.up_to(34))
        assert all(width in widths for width in seen)
        inexact = opened.generate(TEXT, max_new_tokens=40, draft_length=4, exact=False)
        assert (inexact.stats.exact, inexact.stats.widths) == (False, tuple(range(1, 35)))
        assert not all(width in widths for width in seen)


def test_where_no_widths_are_exact_it_is_said(pair_folders: tuple[Path, Path]) -> None:
    with load(*pair_folders, threads=1) as opened:
        assert opened.exact_widths
        set_widths(opened, None)
        stats = opened.generate(TEXT, max_new_tokens=4).stats
        assert (stats.exact, stats.widths) == (False, tuple(range(1, 35)))


def test_stats_add_up(pair: Pair) -> None:
    result = pair.generate(TEXT, max_new_tokens=30, draft_length=6)
    stats = result.stats
    assert stats.new_tokens == len(result.tokens) == 30
    assert 1 + sum(stats.accepted) == 30
    assert stats.rounds == len(stats.accepted) == len(stats.proposed)
    assert max(stats.proposed) == 6 == len(stats.accepted_per_position)
    assert all(0 <= share <= 1 for share in stats.accepted_per_position)
    assert stats.mean_accepted == pytest.approx(29 / stats.rounds)
    seconds = stats.seconds
    assert seconds.total == pytest.approx(seconds.prefill + seconds.draft + seconds.verify + seconds.other)
    assert min(seconds.prefill, seconds.draft, seconds.verify, seconds.other) > 0
    assert 0 < stats.time_to_first_token < seconds.total
    assert (stats.exact, stats.provider) == (True, "cpu")


@pytest.mark.parametrize("limit", [1, 2, 3, 17])
def test_max_new_tokens_is_exact(pair: Pair, limit: int) -> None:
    result = pair.generate(TEXT, max_new_tokens=limit)
    assert (len(result.tokens), result.finish_reason) == (limit, "length")


def test_eos_ends_the_text_and_is_not_in_it(
    pair: Pair, write_artifact: Callable[..., Path], pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    tokens = pair.generate(TEXT, max_new_tokens=40).tokens
    eos = tokens[9]
    with load(write_artifact(tmp_path / "eos", "target", eos=(0, eos)), pair_folders[1]) as ending:
        result = ending.generate(TEXT, max_new_tokens=40)
    assert (result.tokens, result.finish_reason) == (tokens[: tokens.index(eos)], "stop")


def test_generation_fills_the_capacity_exactly(pair: Pair, plain: Pair) -> None:
    prompt = list(range(1, 101))
    result = pair.generate(prompt, max_new_tokens=1000)
    assert (len(prompt) + len(result.tokens), result.finish_reason) == (pair.capacity, "length")
    assert result.tokens == plain.generate(prompt, max_new_tokens=1000).tokens
    assert len(pair.generate([1] * (pair.capacity - 1)).tokens) == 1


def test_a_prompt_that_fills_the_capacity_is_refused(pair: Pair) -> None:
    with pytest.raises(TooLong, match="the prompt has 128 tokens, but the capacity is 128"):
        pair.generate([1] * 128)


def test_a_text_of_megabytes_is_refused_before_it_is_encoded(pair: Pair) -> None:
    """Which takes seconds: those of this text a quarter of a minute."""
    text = "def f(x): return x é " * 800_000
    question = text[:2_000_000]  # more is too much for a template
    start = perf_counter()
    tries: list[Callable[[], object]] = [
        lambda: pair.generate(text),
        lambda: pair.stream(question, chat=True),
        lambda: pair.generate([{"role": "user", "content": question}], special_tokens="encode"),
        lambda: pair.generate([{"role": "user", "content": f"<|im_end|>{question}"}]),
        lambda: pair.chat().send(question),
    ]
    for attempt in tries:
        with pytest.raises(TooLong, match=r"the prompt has at least \d+ tokens, but the capacity is 128"):
            attempt()
    assert perf_counter() < start + 8


@pytest.mark.parametrize(
    ("rows", "most", "hint"),
    [
        ((192, None), 1000, "export the target with a larger --context-length, such as 1000 (it was exported for 128"),
        ((192, 192), 500, "export the target and the draft with a larger --context-length, such as 500 (they were"),
        (
            (192, 320), 500,
            "export the target with a larger --context-length, such as 256 (it was exported for 128 tokens, and the "
            "draft for 256)",
        ),
        (
            (320, 192), 200,
            "export the draft with a larger --context-length, such as 200 (it was exported for 128 tokens, and the "
            "target for 256), or load the target alone",
        ),
        ((320, 192), 128, "the draft cannot be exported for more than 128 tokens, or load the target alone"),
    ],
)  # fmt: skip
def test_the_capacity_says_whose_it_is_and_how_to_get_more(
    write_artifact: Callable[..., Path], tmp_path: Path, rows: tuple[int, int | None], most: int, hint: str
) -> None:
    folders = []
    for role, count in zip(("target", "draft"), rows, strict=True):
        if count:
            folder = write_artifact(tmp_path / role, role, kv_rows=count)
            manifest = Manifest.read(folder)
            replace(manifest, spec=replace(manifest.spec, max_positions=most)).write(folder)
            folders.append(folder)
    with load(*folders, threads=1) as opened, pytest.raises(TooLong) as caught:
        opened.generate([1] * 128)
    assert "the capacity is 128" in str(caught.value) and hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [1, 8])
def test_a_stop_string_across_tokens_cuts_the_text(pair: Pair, k: int) -> None:
    whole = pair.generate(TEXT, max_new_tokens=40)
    stop = whole.text[11:14]
    at = whole.text.index(stop)
    result = pair.generate(TEXT, max_new_tokens=40, draft_length=k, stop=[stop, "never this"])
    assert (result.text, result.finish_reason) == (whole.text[:at], "stop")
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert len(result.tokens) < 40


@pytest.fixture(scope="module")
def marked(pair: Pair) -> tuple[dict[str, Any], Result, int]:
    """Options with which the models write a special token in the middle, what they write, and where it is."""
    marker = pair.text.special_ids()["<|im_start|>"]
    for seed in range(200):
        options = {"max_new_tokens": 40, "logit_bias": {marker: 150.0}, "temperature": 50.0, "seed": seed}
        result = pair.generate(TEXT, **options)
        if marker in result.tokens[5:] and marker not in result.tokens[:5]:
            return options, result, result.tokens.index(marker)
    raise AssertionError("no seed brings the token up")


@pytest.mark.parametrize("k", [0, 1, 8, "auto"])
def test_a_special_token_as_stop_string_ends_the_text(
    pair: Pair, marked: tuple[dict[str, Any], Result, int], k: Any
) -> None:
    """As the last part of a stop string too, whose text before it is not part of the output either."""
    options, whole, at = marked
    assert "<|im_start|>" not in whole.text
    before = pair.text.decode(whole.tokens[:at])
    for stop, text in (("<|im_start|>", before), (before[-1] + "<|im_start|>", before[:-1])):
        chunks = []
        stream = pair.stream(TEXT, **options, draft_length=k, stop=["never", stop])
        chunks = [chunk.text for chunk in stream]
        result = stream.result
        assert (result.text, result.finish_reason, result.tokens) == (text, "stop", whole.tokens[: at + 1])
        assert "".join(chunks) == text


@pytest.mark.parametrize("k", [0, 1, 8, "auto"])
def test_a_stop_token_ends_the_text_as_eos_does(pair: Pair, k: Any) -> None:
    whole = pair.generate(TEXT, max_new_tokens=40)
    stop = whole.tokens[9]
    at = whole.tokens.index(stop)
    for ids in (stop, [stop, 3], (stop,)):
        result = pair.generate(TEXT, max_new_tokens=40, draft_length=k, stop_token_ids=ids)
        assert (result.tokens, result.finish_reason) == (whole.tokens[:at], "stop")
    chat = pair.chat()
    reply = chat.send("the fox", max_new_tokens=20)
    again = pair.chat().send("the fox", max_new_tokens=20, stop_token_ids=reply.tokens[5], draft_length=k)
    assert (again.tokens, again.finish_reason) == (reply.tokens[: reply.tokens.index(reply.tokens[5])], "stop")


def test_text_held_back_for_a_stop_string_comes_at_the_end(pair: Pair) -> None:
    whole = pair.generate(TEXT, max_new_tokens=12)
    result = pair.generate(TEXT, max_new_tokens=12, stop=whole.text[-1] + "x")
    assert (result.text, result.finish_reason) == (whole.text, "length")


@pytest.mark.parametrize("k", [0, 5])
def test_chunks_say_what_their_rounds_cost(pair: Pair, k: int) -> None:
    with pair.stream(TEXT, max_new_tokens=40, draft_length=k) as stream:
        first, *rest = list(stream)
    stats, rounds = stream.result.stats, [chunk.round for chunk in rest if chunk.round]
    assert first.round is None  # it read the prompt
    assert tuple(one.proposed for one in rounds) == stats.proposed
    assert tuple(one.matched for one in rounds) == stats.matched
    assert tuple(one.accepted for one in rounds) == stats.accepted
    assert tuple(one.source for one in rounds) == stats.sources
    assert sum(one.verify_seconds for one in rounds) == pytest.approx(stats.seconds.verify)


def test_a_stream_is_the_result_in_chunks(pair: Pair) -> None:
    expected = pair.generate(TEXT, max_new_tokens=40)
    stream = pair.stream(TEXT, max_new_tokens=40)
    with pytest.raises(Failure, match="not read to its end"):
        _ = stream.result
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == expected.text == stream.result.text
    assert tuple(token for chunk in chunks for token in chunk.tokens) == expected.tokens
    assert all("".join(chunk.pieces) == chunk.text for chunk in chunks)
    flags = [flag for chunk in chunks for flag in chunk.drafted]
    assert flags.count(False) == len(chunks) - (stream.result.stats.accepted[-1] == stream.result.stats.proposed[-1])
    assert not chunks[0].drafted[0]
    assert list(stream) == [] and stream.result.tokens == expected.tokens


def test_a_stream_left_early_leaves_the_pair_ready(pair: Pair) -> None:
    expected = pair.generate(TEXT, max_new_tokens=40).tokens
    with pair.stream("lazy dog", max_new_tokens=40) as stream:
        next(stream)
        next(stream)
    assert pair.generate(TEXT, max_new_tokens=40).tokens == expected
    with pytest.raises(ZeroDivisionError):
        for _ in pair.stream("lazy dog", max_new_tokens=40):
            raise ZeroDivisionError
    assert pair.generate(TEXT, max_new_tokens=40).tokens == expected


def test_a_pair_is_closed_after_its_streams(pair_folders: tuple[Path, Path]) -> None:
    with load(*pair_folders, threads=1) as pair:
        with pair.stream(TEXT) as stream:
            next(stream)
            with pytest.raises(Failure, match="generating; close its stream first"):
                pair.close()
            next(stream)  # unharmed
        never_read = pair.stream(TEXT)
    with pytest.raises(Failure, match="this pair is closed"):
        next(never_read)


def test_an_interrupted_call_leaves_the_pair_ready_while_its_traceback_lives(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a Python prompt, which keeps the last traceback."""
    step = pard_onnx.Stream.__next__
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:

        def between_rounds(stream: pard_onnx.Stream) -> pard_onnx.Chunk:
            step(stream)
            raise KeyboardInterrupt

        patch.setattr(pard_onnx.Stream, "__next__", between_rounds)
        pair.generate(TEXT)
    assert pair.generate(TEXT, max_new_tokens=2).finish_reason == "length"
    assert kept.tb is not None


def test_one_stream_is_not_for_two_threads(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    stream = pair.stream(TEXT)
    step = pair.engine.models[0].session.step  # type: ignore[union-attr]

    def meanwhile(ids: list[int], keep: int) -> object:
        for act in (stream.close, stream.__next__):
            with pytest.raises(Failure) as caught:
                act()
            problems.append(str(caught.value))
        return step(ids, keep)

    monkeypatch.setattr(pair.engine.models[0].session, "step", meanwhile)  # type: ignore[union-attr]
    next(stream)
    stream.close()
    assert set(problems) == {"another thread is reading this stream; leave its loop there, or cancel() the stream"}


def test_a_stream_is_cancelled_from_another_thread_within_a_step(pair: Pair) -> None:
    expected = pair.generate(TEXT, max_new_tokens=40).tokens
    stream = pair.stream(TEXT, max_new_tokens=100)
    first = next(stream)
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    assert not any(chunk.tokens for chunk in stream)  # only text that was held back
    result = stream.result
    assert (result.finish_reason, result.tokens) == ("cancelled", first.tokens)
    assert pair.generate(TEXT, max_new_tokens=40).tokens == expected


def test_a_stream_cancelled_before_its_first_step_has_no_tokens(pair: Pair) -> None:
    stream = pair.stream(TEXT)
    stream.cancel()
    assert list(stream) == []
    assert (stream.result.finish_reason, stream.result.tokens, stream.result.text) == ("cancelled", (), "")


def test_a_deadline_ends_the_text_as_it_is(pair: Pair) -> None:
    result = pair.generate(TEXT, max_new_tokens=100, timeout=1e-9)
    assert (result.finish_reason, result.tokens) == ("timeout", ())
    assert pair.generate(TEXT, max_new_tokens=10, timeout=1000).finish_reason == "length"


@pytest.mark.parametrize("lookup", [True, False])
def test_self_tuned_drafts_change_no_token(pair: Pair, plain: Pair, lookup: bool) -> None:
    prompt = TEXT + " fox" * 20
    expected = plain.generate(prompt, max_new_tokens=60, draft_length=0).tokens
    for _ in range(3):  # what it learned goes on from one generation to the next
        result = pair.generate(prompt, max_new_tokens=60, lookup=lookup)
        assert result.tokens == expected
        assert lookup or "lookup" not in result.stats.sources


def test_drawn_tokens_are_the_same_however_they_are_drafted(pair: Pair, plain: Pair) -> None:
    def draw(of: Pair, **options: Any) -> Any:
        return of.generate(TEXT, max_new_tokens=40, temperature=1.5, top_p=0.9, **options)

    one = draw(plain, seed=7, draft_length=0)
    assert one.stats.seed == 7
    for options in ({"draft_length": 5}, {"draft_length": 8}, {}, {"lookup": False}):
        assert draw(pair, seed=7, **options).tokens == one.tokens
    assert draw(pair, seed=8).tokens != one.tokens
    fresh = draw(pair)
    assert draw(pair, seed=fresh.stats.seed).tokens == fresh.tokens
    assert pair.generate(TEXT, max_new_tokens=2, seed=3).stats.seed is None  # nothing was drawn


def test_what_onnx_runtime_says_in_a_step_is_a_failure(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run_with_iobinding(self, _: object) -> None:
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(pair.engine.models[0].session, "_session", Broken())  # type: ignore[union-attr]
    with pytest.raises(Failure, match=r"model\.onnx: ONNX Runtime failed in a step: the device is gone"):
        pair.generate(TEXT)


def test_a_closed_pair_says_so(pair_folders: tuple[Path, Path]) -> None:
    with load(*pair_folders) as opened:
        pass
    with pytest.raises(Failure, match="this pair is closed"):
        opened.generate(TEXT)


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1, 280], {}, "token id 280 in the prompt; the model has ids 0 to 279"),
        ([-1], {}, "token id -1"),
        ([1.5], {}, "a prompt is text, token ids, or a list of messages"),
        ("half \ud83d", {}, "the prompt is not valid Unicode"),
        (["a"], {}, "a prompt is text, token ids, or a list of messages"),
        (TEXT, {"draft_length": -1}, "draft_length must be from 0 to 32, not -1"),
        (TEXT, {"draft_length": 33}, "draft_length must be from 0 to 32, not 33"),
        (TEXT, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        (None, {}, "a prompt is text, token ids, or a list of messages with role and content, not None"),
        (b"abc", {}, "not bytes"),
        (5, {}, "not int"),
        (TEXT, {"draft_length": 7.5}, "draft_length must be a whole number, not 7.5"),
        (TEXT, {"draft_length": None}, "draft_length must be a whole number, not None"),
        (TEXT, {"draft_length": "many"}, "draft_length must be 'auto' or from 0 to 32, not 'many'"),
        (TEXT, {"timeout": 0}, "timeout must be a number of seconds above 0, or None, not 0"),
        (TEXT, {"timeout": "1"}, "timeout must be a number of seconds above 0, or None, not '1'"),
        (TEXT, {"temprature": 1}, "unknown option temprature; did you mean temperature?"),
        (TEXT, {"temperature": -1}, "temperature must be at least 0"),
        (TEXT, {"logit_bias": {280: 1.0}}, "280"),
        (TEXT, {"max_new_tokens": "12"}, "max_new_tokens must be a whole number, not '12'"),
        (TEXT, {"stop": None}, "a stop string must be text of at least one character, not None"),
        (TEXT, {"stop": 5}, "not 5"),
        (TEXT, {"stop": [""]}, "a stop string must be text"),
        (TEXT, {"stop_token_ids": 280}, "stop_token_ids: id 280 does not exist; the model's ids are 0 to 279"),
        (TEXT, {"stop_token_ids": [3, -1]}, "an id of stop_token_ids must be at least 0, not -1"),
        (TEXT, {"stop_token_ids": "12"}, "an id of stop_token_ids must be a whole number, not '12'"),
        (TEXT, {"stop_token_ids": [True]}, "an id of stop_token_ids must be a whole number, not True"),
        (TEXT, {"stop_token_ids": None}, "an id of stop_token_ids must be a whole number, not None"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    pair: Pair, prompt: Prompt, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(BadInput, match=problem):
        pair.stream(prompt, **options)  # type: ignore[arg-type]


def test_chat_text_is_a_users_message(pair: Pair) -> None:
    as_messages = pair.generate([{"role": "user", "content": "fox"}], max_new_tokens=8)
    assert pair.generate("fox", chat=True, max_new_tokens=8).tokens == as_messages.tokens
    assert pair.generate("fox", max_new_tokens=8).stats.prompt_tokens < as_messages.stats.prompt_tokens


def test_padded_vocabularies_may_differ(pair: Pair) -> None:
    assert pair.draft_manifest is not None
    assert pair.target_manifest.spec.vocabulary.rows != pair.draft_manifest.spec.vocabulary.rows


def test_roles_are_not_exchanged(pair_folders: tuple[Path, Path]) -> None:
    target, draft = pair_folders
    with pytest.raises(BadArtifact, match=r"draft: is a draft, not a target; give it as draft"):
        load(draft)
    with pytest.raises(BadArtifact, match=r"target: is a target, not a draft; give it as target"):
        load(target, target)


def test_different_tokenizers_are_refused_with_the_first_id(
    pair_folders: tuple[Path, Path], write_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_artifact(tmp_path / "other", "draft", text="pack my box with five dozen liquor jugs and more")
    with pytest.raises(BadArtifact, match=r"its tokenizer is not that of .*; id 256 is '.+' there and '.+' here"):
        load(pair_folders[0], other)


def test_the_same_tokenizer_in_other_bytes_is_the_same(
    pair_folders: tuple[Path, Path], write_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    draft = write_artifact(tmp_path / "draft", "draft")
    path = draft / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    manifest = Manifest.read(draft)
    files = tuple(type(file).of(draft / file.name) for file in manifest.files)
    type(manifest)(**{**{name: getattr(manifest, name) for name in manifest.__slots__}, "files": files}).write(draft)
    assert load(pair_folders[0], draft).generate(TEXT, max_new_tokens=2).finish_reason == "length"


def test_a_damaged_folder_is_refused(write_artifact: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "target", "target")
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(BadArtifact, match=r"model\.onnx"):
        load(folder)


def test_a_provider_that_is_not_there_is_refused(pair_folders: tuple[Path, Path]) -> None:
    with pytest.raises(BadProvider, match=r"pip install .*\[migraphx\]"):
        load(*pair_folders, provider="migraphx")


LIGHT = """
import sys, pard_onnx
pair = pard_onnx.load(*sys.argv[1:3])
pair.generate([{"role": "user", "content": "the fox"}], max_new_tokens=8)
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_running_a_pair_imports_nothing_heavy(pair_folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", LIGHT, *map(str, pair_folders)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_public_names() -> None:
    assert sorted(name for name in pard_onnx.__all__ if name[0].islower()) == ["freeze_support", "load"]
    assert all(hasattr(pard_onnx, name) for name in pard_onnx.__all__)
    assert pard_onnx.__version__
