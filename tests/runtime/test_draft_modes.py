"""A PARD-2 pair on toy graphs: the same text in every mode, features beside the right tokens, refusals by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_onnxruntime import FakeOnnxruntime
from numpy.typing import NDArray

from pard_onnx import BadArtifact, BadInput, Pair, PardWarning, load
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime import engine
from pard_onnx.runtime.decoding.drafter import DraftMemory
from pard_onnx.runtime.decoding.pard2 import KEPT_BEHIND, Pard2Drafter
from pard_onnx.runtime.options import Options
from pard_onnx.runtime.prefixes import CACHE_BYTES

LAYERS, ROWS = (-1, -2), 1024 + 64
PROMPT = [1 + number % 250 for number in range(300)]
LENGTHS = (1, 2, 3, 5, 8, 16, "auto")
SAMPLED = {"temperature": 0.7, "seed": 5}


@pytest.fixture(scope="module")
def make(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("features")

    def folder(name: str, role: str, **options: Any) -> Path:
        return write_artifact(root / name, role, **({"features": LAYERS, "kv_rows": ROWS} | options))

    return folder


@pytest.fixture(scope="module")
def folders(make: Callable[..., Path]) -> tuple[Path, Path]:
    return make("target", "target"), make("draft", "draft", bias=True, rows=284)


@pytest.fixture(scope="module")
def without(make: Callable[..., Path]) -> Path:
    return make("without", "target", features=())


@pytest.fixture(scope="module")
def reference(folders: tuple[Path, Path]) -> Pair:
    return load(folders[0], threads=1)


@pytest.fixture
def pair(folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*folders, threads=1) as opened:
        yield opened


def features_of(pair: Pair, ids: list[int]) -> NDArray[Any]:
    """The target's features of a text that is read at once."""
    session = pair.engine.models[0].session
    session.rollback(0)
    rows = session.step(ids, 1, True).features
    assert rows is not None
    session.rollback(0)
    return rows.copy()


class Fed:
    """What the draft was fed: of each row its position, its token and its features."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, NDArray[Any] | None]] = []

    def check(self, reference: Pair, text: list[int]) -> list[int]:
        """Every row has the features of the token before it, or none; the positions of the latter."""
        expected, none = features_of(reference, text), []
        for position, token, row in self.rows:
            assert text[position] == token
            if row is None or not row.any():
                none.append(position)
            elif position:
                np.testing.assert_allclose(row[:-1], expected[position - 1], rtol=1e-3, atol=1e-3)
                assert row[-1] == 1
            else:
                assert not row[:-1].any() and row[-1] == 1
        self.rows.clear()
        return sorted(set(none))


@contextmanager
def recorded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fed]:
    draft = pair.engine.models[1]
    assert draft
    fed, session = Fed(), draft.session
    step = session.step

    def recording(ids: list[int], draft_length: int, features: Any = None) -> Any:
        rows = [None] * len(ids) if features is None else [row.copy() for row in features]
        fed.rows += zip(range(session.length, session.length + len(ids)), ids, rows, strict=True)
        return step(ids, draft_length, features)

    with monkeypatch.context() as patch:
        patch.setattr(session, "step", recording)
        yield fed


@pytest.mark.parametrize("mode", ["target-dependent", "target-independent"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "drawn"])
def test_both_modes_give_plain_tokens(
    folders: tuple[Path, Path], reference: Pair, mode: Any, sampling: dict[str, Any]
) -> None:
    with load(*folders, threads=1, draft_mode=mode) as pair:
        for prompt in ("the quick brown fox", PROMPT, [7]):
            plain = reference.generate(prompt, max_new_tokens=40, draft_length=0, **sampling)
            for k in LENGTHS:
                found = pair.generate(prompt, max_new_tokens=40, draft_length=k, **sampling)  # type: ignore[arg-type]
                assert (found.tokens, found.finish_reason) == (plain.tokens, plain.finish_reason), (prompt, k)
                drafted = {"target-dependent": "pard2", "target-independent": "pard2-independent"}[mode]
                assert set(found.stats.sources) <= {drafted, "lookup", "none"}
                assert k == "auto" or drafted in found.stats.sources
        assert pair.info().draft_mode == mode
        assert pair.generate("the quick", max_new_tokens=9, draft_length=0).stats.sources == ("none",) * 8


def test_the_mode_is_target_dependent_where_the_target_gives_features(pair: Pair, pair_folders: Any) -> None:
    assert pair.info().draft_mode == "target-dependent"
    with load(*pair_folders, threads=1) as ordinary:
        assert ordinary.info().draft_mode is None
        assert set(ordinary.generate("the", draft_length=4).stats.sources) - {"none"} == {"pard"}


def test_features_stand_beside_the_right_tokens(pair: Pair, reference: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(pair, monkeypatch) as fed:
        for prompt in (PROMPT, [7, 8], [*PROMPT[:200], 5, 6]):  # the last one begins as the first one did
            for k in (1, 4, 16, "auto"):
                found = pair.generate(prompt, max_new_tokens=30, draft_length=k)
                assert fed.check(reference, prompt + list(found.tokens)) == []


def test_conversations_edits_and_restored_files_keep_them_aligned(
    pair: Pair, folders: tuple[Path, Path], reference: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chat = pair.chat("be brief")
    with recorded(pair, monkeypatch) as fed:
        for number, text in enumerate(("the quick fox", "jumps", "over", "the lazy dog")):
            chat.send(text, max_new_tokens=40, draft_length=4)
            assert fed.check(reference, chat._sequence.tokens) == []  # type: ignore[union-attr]
            if number == 1:
                chat.messages[1]["content"] = "the quick hen"  # the next turn begins in the middle
    chat.save(tmp_path / "chat")
    with load(*folders, threads=1) as other, recorded(other, monkeypatch) as fed:
        restored = other.restore(tmp_path / "chat")
        found = restored.send("again", max_new_tokens=30, draft_length=4)
        assert fed.rows[0][0] > 100  # what the draft had read is not read again
        assert fed.check(reference, restored._sequence.tokens) == []  # type: ignore[union-attr]
    assert found.tokens == chat.send("again", max_new_tokens=30, draft_length=4).tokens


def test_a_conversation_saved_in_the_other_mode_goes_on(
    pair: Pair, folders: tuple[Path, Path], reference: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with load(*folders, threads=1, draft_mode="target-independent") as other:
        chat = other.chat()
        chat.send("the quick fox", max_new_tokens=30, draft_length=4)
        chat.save(tmp_path / "chat")
    with np.load(tmp_path / "chat") as arrays:
        assert "features" not in arrays
    with recorded(pair, monkeypatch) as fed:
        restored = pair.restore(tmp_path / "chat")
        restored.send("jumps", max_new_tokens=30, draft_length=4)
        assert fed.check(reference, restored._sequence.tokens) == []  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", [lambda rows: rows[:, :-1], lambda rows: rows.astype(np.int64),
                                    lambda rows: np.repeat(rows, 99, axis=0), lambda rows: rows[0]])  # fmt: skip
def test_a_damaged_file_is_refused(pair: Pair, tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    chat = pair.chat()
    chat.send("the quick fox", max_new_tokens=20, draft_length=4)
    chat.save(tmp_path / "chat")
    with np.load(tmp_path / "chat") as found:
        arrays = dict(found)
    arrays["features"] = damage(arrays["features"])
    with (tmp_path / "damaged").open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(BadArtifact, match="is damaged"):
        pair.restore(tmp_path / "damaged")


def test_tokens_that_were_made_without_drafts_are_not_computed_again(
    pair: Pair, reference: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft reads them as in target-independent mode, so that the next generation begins as fast as without it."""
    text = PROMPT + list(pair.generate(PROMPT, max_new_tokens=20, draft_length=4).tokens)
    text += pair.generate(text, max_new_tokens=60, draft_length=0).tokens
    session, starts = pair.engine.models[0].session, []
    step = session.step
    with recorded(pair, monkeypatch) as fed, monkeypatch.context() as patch:
        patch.setattr(session, "step", lambda ids, *more: (starts.append(session.length), step(ids, *more))[1])
        found = pair.generate([*text, 7], max_new_tokens=30, draft_length=4)
    assert min(starts) == found.stats.cached_tokens == len(text) - 1
    unknown = fed.check(reference, [*text, 7, *found.tokens])
    assert len(unknown) >= 50 and unknown == list(range(unknown[0], len(text)))


def test_an_open_pair_is_lent_in_the_other_mode(pair: Pair, reference: Pair) -> None:
    """How both modes are compared: one target and one draft in memory."""
    with load(pair, pair, draft_mode="target-independent") as other:
        assert (pair.info().draft_mode, other.info().draft_mode) == ("target-dependent", "target-independent")
        expected = reference.generate(PROMPT, max_new_tokens=30, draft_length=0).tokens
        streams = [one.stream(PROMPT, max_new_tokens=30, draft_length=4) for one in (pair, other)]
        for chunks in zip(*streams, strict=False):
            assert chunks
        assert [one.read().tokens for one in streams] == [expected] * 2


def test_a_target_without_features(without: Path, folders: tuple[Path, Path], reference: Pair) -> None:
    fix = r"pard-export --model toy-target --features=-1,-2"
    with pytest.raises(BadArtifact, match=rf"layers -1,-2, but .*without was exported with none; .*{fix}") as caught:
        load(without, folders[1], threads=1, draft_mode="target-dependent")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    with pytest.warns(PardWarning, match=fix):
        pair = load(without, folders[1], threads=1)
    with pair:
        assert pair.info().draft_mode == "target-independent"
        found = pair.generate("the quick", max_new_tokens=20, draft_length=4)
        assert found.tokens == reference.generate("the quick", max_new_tokens=20, draft_length=0).tokens
    load(without, folders[1], threads=1, draft_mode="target-independent").close()  # no warning


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"features": (-2, -3)}, "layers -2,-3, but .* was exported with -1,-2; export it again: .*=-2,-3,-1, or"),
        ({"hidden": 48}, "reads 96 numbers a token, but 2 layers of .* have 64; take a draft"),
    ],
)
def test_a_draft_of_other_layers_or_of_a_target_of_another_size(
    make: Callable[..., Path], folders: tuple[Path, Path], options: dict[str, Any], problem: str
) -> None:
    draft = make("-".join(map(str, options.values())), "draft", **options)
    with pytest.raises(BadArtifact, match=problem):
        load(folders[0], draft, threads=1, draft_mode="target-dependent")
    with pytest.warns(PardWarning, match=problem.removesuffix(", or")), load(folders[0], draft, threads=1) as pair:
        assert pair.info().draft_mode == "target-independent"


@pytest.mark.parametrize("layers", [(-2, -1), (-1,), (-2,), (-3, -1), (-1, -3), (-2, -3)])
@pytest.mark.parametrize("length", [1, 4, "auto"])
def test_a_target_that_gives_more_layers_or_in_another_order(
    make: Callable[..., Path], layers: tuple[int, ...], length: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft is fed the columns of its own layers, in its own order."""
    given = (-1, -2, -3)
    target = make(f"wide {layers} {length}", "target", features=given)
    draft = make(f"narrow {layers} {length}", "draft", features=layers, bias=True, rows=284)
    hidden = Manifest.read(target).spec.hidden
    with load(target, draft, threads=1, draft_mode="target-dependent") as pair, load(target, threads=1) as alone:
        expected = alone.generate(PROMPT, max_new_tokens=30, draft_length=0).tokens
        with recorded(pair, monkeypatch) as fed:
            found = pair.generate(PROMPT, max_new_tokens=30, draft_length=length)
        assert found.tokens == expected
        whole = features_of(alone, [*PROMPT, *found.tokens])
        mine = np.concatenate([whole[:, given.index(one) * hidden :][:, :hidden] for one in layers], axis=1)
        checked = 0
        for position, _, row in fed.rows:
            if position and row is not None:
                np.testing.assert_allclose(row[:-1], mine[position - 1], rtol=1e-3, atol=1e-3)
                checked += 1
        assert checked > len(PROMPT) or length == "auto"


@pytest.mark.parametrize("waiting", [1 << 30, 1])
@pytest.mark.parametrize("length", [1, 4])
def test_a_prompt_whose_log_probabilities_are_asked_for(
    pair: Pair, reference: Pair, monkeypatch: pytest.MonkeyPatch, length: int, waiting: int
) -> None:
    """The steps that score the prompt give its features, and all rows that the draft is fed have theirs."""
    monkeypatch.setattr(engine, "Pard2Drafter", partial(Pard2Drafter, waiting_bytes=waiting))
    options: dict[str, Any] = {"max_new_tokens": 30, "draft_length": length, "prompt_logprobs": 2, "logprobs": 1}
    expected = reference.generate(PROMPT, **{**options, "draft_length": 0})
    for _ in range(2):  # the second begins with the rows of the first
        with recorded(pair, monkeypatch) as fed:
            found = pair.generate(PROMPT, **options)
        assert found.tokens == expected.tokens
        assert found.prompt_logprobs == expected.prompt_logprobs and found.logprobs == expected.logprobs
        assert len(fed.rows) > 30
        assert fed.check(reference, [*PROMPT, *found.tokens]) == []


def test_another_family(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = Manifest.read

    def other(folder: Path) -> Manifest:
        found = read(folder)
        family = "llama" if found.role == "draft" else found.spec.family
        return replace(found, spec=replace(found.spec, family=family))

    monkeypatch.setattr(Manifest, "read", other)
    with pytest.raises(BadArtifact, match=r"reads the hidden states of a llama, but .* is a qwen2; take a draft"):
        load(*folders, threads=1, draft_mode="target-dependent")


def test_modes_that_do_not_fit_are_refused(folders: tuple[Path, Path], pair_folders: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="draft_mode 'dependent' is not known; did you mean 'target-dependent'"):
        load(*folders, draft_mode="dependent")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="draft_mode 3 is not known"):
        load(*folders, draft_mode=3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="reads no hidden states of its target; take a PARD-2 draft"):
        load(*pair_folders, draft_mode="target-dependent")
    with pytest.raises(BadInput, match="there is no draft"):
        load(folders[0], draft_mode="target-dependent")
    load(*pair_folders, threads=1, draft_mode="target-independent").close()


def test_features_count_in_the_memory_of_sequences(pair: Pair) -> None:
    width = 4 * 2 * 32
    assert pair.sequence_bytes >= pair.capacity * width
    pair.generate(PROMPT, max_new_tokens=1, draft_length=4)  # the draft has read nothing of it
    (kept,) = pair.engine.prefixes.kept
    assert kept.memory.bytes == (kept.target.length) * width
    assert kept.bytes == kept.target.bytes + kept.draft.bytes + kept.memory.bytes  # type: ignore[union-attr]
    pair.generate(PROMPT, max_new_tokens=40, draft_length=4)
    (kept,) = pair.engine.prefixes.kept
    assert kept.memory.bytes <= (KEPT_BEHIND + 10) * width < CACHE_BYTES


def test_a_fork_is_independent(pair: Pair) -> None:
    sequence = pair.engine.new_sequence()
    sequence.tokens = list(PROMPT)
    for _ in pair.engine.run(sequence, Options(max_new_tokens=20, draft_length=4)):
        pass
    fork = sequence.fork(pair.engine.new_sequence, 100)
    before = sequence.memory.copy()
    assert fork.memory.seen == 100
    for _ in pair.engine.run(fork, Options(max_new_tokens=20, draft_length=4)):
        pass
    assert (sequence.memory.first, len(sequence.memory.features)) == (before.first, len(before.features))
    assert isinstance(fork.memory, DraftMemory) and fork.memory.seen == fork.target.length


def test_on_a_device(device: Callable[..., FakeOnnxruntime], folders: tuple[Path, Path], reference: Pair) -> None:
    """Both models there, and the draft alone: features go through the host's memory."""
    device("CUDAExecutionProvider")
    expected = reference.generate(PROMPT, max_new_tokens=30, draft_length=0).tokens
    for where in ({"provider": "cuda"}, {"draft_provider": "cuda"}, {"provider": "cuda", "draft_provider": "cpu"}):
        with load(*folders, **where) as pair:  # type: ignore[arg-type]
            assert pair.info().draft_mode == "target-dependent"
            for k in (1, 4, "auto"):
                found = pair.generate(PROMPT, max_new_tokens=30, draft_length=k)
                assert found.tokens == expected and not found.stats.ahead
            assert "pard2" in pair.generate(PROMPT, max_new_tokens=30, draft_length=4).stats.sources
