"""`pard-adapt` up to the training and after it; a stand-in takes the place of the training itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf_files
import numpy as np
import pytest
import quantized
from tiny import CHAT_TEMPLATE, edit_json, write

from pard_onnx import load
from pard_onnx.adapt_command import main
from pard_onnx.adapt_samples import end_of_reply
from pard_onnx.models.adapt.samples import SampleStore
from pard_onnx.models.adapt.settings import Settings
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import install_command
from pard_onnx.runtime.text.tokenizer import Text

CHATS = [
    {"conversation": [{"human": f"a{n}", "assistant": f"b{n}"}, {"human": "c", "assistant": "d"}]} for n in range(6)
]


@dataclass(frozen=True)
class Outcome:
    mean_accepted: float = 2.5
    projection: str | None = None


@dataclass(frozen=True)
class Memory:
    total: int = 7
    fits: bool = True
    available: int = 8  # too little to load a target that nobody asked for


class Trainer:
    """Stands for the training: notes what it was given, and changes one weight."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def adapt(
        self,
        start: Any,
        training: Sequence[Any],
        held_out: Sequence[Any],
        settings: Any,
        folder: Path,
        target: Any = None,
        **_: Any,
    ) -> Outcome:
        self.calls.append(SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"}))
        start.model.get_input_embeddings().weight.data[0, 0] = 3.0
        return Outcome()

    def write_card(self, folder: Path, outcome: Any, settings: Any, facts: Any) -> None:
        (folder / "README.md").write_text(json.dumps(facts))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    found = Trainer()
    names = {
        "run": {"adapt": found.adapt, "Outcome": Outcome},
        "memory": {"estimate": lambda *_: Memory(), "require_room": lambda *_: Memory()},
        "card": {"write_card": found.write_card},
    }
    for name, items in names.items():
        module = ModuleType(f"pard_onnx.models.adapt.{name}")
        vars(module).update(items)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write(tmp_path / "target", layers=3, tokenizer_size=300)


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write(tmp_path / "small", layers=2, tokenizer_size=300, seed=1, dtype="bfloat16")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return saved(tmp_path / "data.jsonl", CHATS)


def saved(file: Path, items: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return file


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_run_writes_a_draft_that_is_exported(
    trainer: Trainer, draft: Path, target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "draft"
    words = ("--draft", draft, "--target", target, "--data", data, "--output", output, "--held-out", 1)
    assert run(*words, "--sequence-tokens", 99, "--seed", 4, "--freeze-embedding") == 0
    (call,) = trainer.calls
    assert call.settings == Settings("pard", freeze_embedding=True, sequence_tokens=99, seed=4)
    assert (len(call.training), len(call.held_out), call.target) == (5, 1, None)
    assert call.folder == tmp_path / "out" / "draft.work" / "training"
    spec = Checkpoint.open(output).spec
    assert spec.pard is not None and spec.pard.mask_id == 300 and spec.dtype == "bfloat16"
    assert "mask_token" in json.loads((output / "README.md").read_text())
    shown = capsys.readouterr().out
    assert "mean accepted length 2.50" in shown and f"pard-export --model {output}" in shown

    before = {path: path.stat().st_mtime_ns for path in output.with_name("draft.work").rglob("*.bin")}
    assert before and run(*words, "--sequence-tokens", 99, "--force") == 0
    after = {path: path.stat().st_mtime_ns for path in output.with_name("draft.work").rglob("*.bin")}
    assert after == before, "samples are made once"
    assert run(*words, "--sequence-tokens", 98, "--force") == 0
    assert len(list(output.with_name("draft.work").glob("samples-*"))) == 2


def test_a_shallow_draft_of_the_target(trainer: Trainer, target: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "draft"
    words = ("--shallow", 2, "--layers", "last", "--target", target, "--data", data, "--output", output)
    assert run(*words, "--method", "pard2") == 0
    (call,) = trainer.calls
    assert call.start.note == "layers 1, 2 of the 3 of target" and call.target.config.num_hidden_layers == 3
    assert Checkpoint.open(output).spec.layers == 2


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    trainer: Trainer, draft: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run("--draft", draft, "--data", data, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "mask token: 300, a row past the tokenizer's ids" in shown and "small-pard" in shown
    assert "data: 6 documents, 6 samples" in shown and "total=7" in shown
    assert run("--draft", draft, "--data", data, "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["mask_token"]["id"] == 300
        and facts["samples"]["samples"] == 6
        and facts["memory"] == {"total": 7, "fits": True, "available": 8}
    )
    assert sorted(tmp_path.rglob("*")) == before and not trainer.calls


def test_prepare_ends_before_the_training(trainer: Trainer, draft: Path, data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert run("--draft", draft, "--data", data, "--prepare", "--work", work, "--output", tmp_path / "out") == 0
    assert not trainer.calls and not (tmp_path / "out").exists()
    (folder,) = work.glob("samples-*")
    assert len(SampleStore(folder)) == 6


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], trainer: Trainer) -> Callable[..., str]:
    def call(*words: object) -> str:
        assert run(*words) == 2
        *bars, shown = capsys.readouterr().err.splitlines()
        assert shown.startswith("error: ") and not trainer.calls
        assert all("samples" in bar or "prompts" in bar for bar in bars)
        return shown

    return call


def test_options_that_do_not_fit(
    refused: Callable[..., str], draft: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    needed = ("--data", data, "--output", tmp_path / "out")
    small = ("--draft", draft, *needed)
    assert "--draft ID_OR_DIR, or --shallow N" in refused(*needed)
    assert "--draft ID_OR_DIR, or --shallow N" in refused(*small, "--shallow", 1)
    assert "--shallow: of which target?" in refused("--shallow", 1, *needed)
    assert "--method pard2: of which target?" in refused(*small, "--method", "pard2")
    assert "--self-distill: of which target?" in refused(*small, "--self-distill")
    for words in (("--exported", "x"), ("--layers", "first"), ("--revision", "x"), ("--temperature", 0.5)):
        assert f"{words[0]} {words[1]}: is for --" in refused(*small, *words)
    assert "--shallow 9: the target has 3 layers" in refused("--shallow", 9, "--target", target, *needed)
    assert "--shallow must be at least 1" in refused("--shallow", 0, "--target", target, *needed)
    assert "--temperature must be at least 0" in refused(
        *small, "--target", target, "--self-distill", "--temperature", -1
    )
    assert "--temperature must be a finite number" in refused(
        *small, "--target", target, "--self-distill", "--temperature", "nan"
    )
    assert "--held-out must be at least 1" in refused(*small, "--held-out", 0)
    assert "--patience must be at least 1, not 0" in refused(*small, "--patience", 0)
    assert "--rate must be a finite number" in refused(*small, "--rate", "nan")
    assert "--draft-length must be from 1 to 32, not 0" in refused(*small, "--draft-length", 0)
    assert "--sequence-tokens must be at least 10, not 1" in refused(*small, "--sequence-tokens", 1)
    assert "--steps must be at least 1, not 0" in refused(*small, "--steps", 0)
    for epochs in (0, -1, "nan", "inf"):
        assert "--epochs must be " in refused(*small, "--epochs", epochs)
    assert "--expected-acceptance yes: of which target?" in refused(*small, "--expected-acceptance", "yes")
    pard2 = (*small, "--target", target, "--method", "pard2")
    assert "measures it; leave it out" in refused(*pard2, "--expected-acceptance", "no")
    assert "--mask-token 7: " in refused(*small, "--mask-token", 7)
    assert "none would be left to train on" in refused(*small, "--held-out", 6)
    assert "there is no such file" in refused("--draft", draft, "--data", "none.jsonl")
    (tmp_path / "out").mkdir()
    assert "exists already; choose another --output, or replace it with --force" in refused(*small)


def test_folders_that_cannot_be_written(
    refused: Callable[..., str], draft: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(output: Path, *words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        shown = refused("--draft", draft, "--data", data, "--output", output, *words)
        assert sorted(tmp_path.rglob("*")) == before
        return shown

    out, full, file = tmp_path / "out", tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").touch()
    file.touch()
    assert "holds mine.txt, which is not a draft's" in said(full, "--force")
    assert f"--output {file}: is a file; choose another --output" in said(file, "--force")
    assert f"{file} is not a folder" in said(file / "out") or "Not a directory" in said(file / "out")
    assert f"holds {draft}, which the training reads" in said(draft, "--force")
    assert f"holds {draft}, which the training reads" in said(tmp_path, "--force")
    assert f"--work {out}: is the output folder" in said(out, "--work", out)
    assert f"--work {out / 'work'}: lies in the output folder" in said(out, "--work", out / "work")
    assert f"--work {tmp_path}: holds the output folder" in said(out, "--work", tmp_path)
    assert f"--work {file}: is a file" in said(out, "--work", file)
    assert f"--work {file / 'work'}: {file} is not a folder" in said(out, "--work", file / "work")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert f"--output {out}: there is no permission to write to {tmp_path}" in said(out)


def test_a_draft_is_replaced_by_force(trainer: Trainer, draft: Path, data: Path, tmp_path: Path) -> None:
    words = ("--draft", draft, "--data", data, "--output", tmp_path / "out", "--held-out", 1)
    assert run(*words) == run(*words, "--force") == 0
    assert run(*words) == 2


def test_an_export_of_another_model_writes_no_replies(refused: Callable[..., str], target: Path, data: Path) -> None:
    words = ("--self-distill", "--data", data)
    assert "--exported demo-draft: is a draft; name the exported target" in refused(
        "--draft", "demo-ar-draft", *words, "--exported", "demo-draft"
    )
    shown = refused("--shallow", 1, "--target", target, *words, "--exported", "demo-target")
    assert f"is of another model than --target {target}: " in shown and "export that target, or leave" in shown
    assert "its tokenizer is not that of" in refused("--draft", target, *words, "--exported", "demo-target")
    assert "is a checkpoint, not exported yet" in refused("--draft", target, *words, "--exported", target)


def test_questions_are_checked_before_the_target_is_exported(
    refused: Callable[..., str], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pard_onnx.adapt_samples.exported_once", None)
    words = ("--shallow", 1, "--target", target, "--self-distill", "--output", tmp_path / "out")
    file = tmp_path / "data.jsonl"
    for items in ([], [{"messages": []}, {"text": " "}], [{"messages": [{"role": "assistant", "content": "a"}]}]):
        for more in ((), ("--dry-run",)):
            shown = refused(*words, "--data", saved(file, items), *more)
            assert f"{len(items)} documents, and none has a message or a text" in shown
    for items, more in (([{"prompt": "b"}], ()), ([{"prompt": "b"}] * 3, ("--held-out", 3))):
        shown = refused(*words, "--data", saved(file, items), *more)
        assert f"{len(items)} replies in {len(items)} documents, so that none would be left to train on" in shown
    edit_json(target / "tokenizer_config.json", chat_template="{{ raise_exception('no ' + messages[0].role) }}")
    shown = refused(*words, "--data", saved(file, [{"text": "a"}, {"prompt": "b"}]))
    assert f"{file} line 2: " in shown and "no user" in shown
    assert not (tmp_path / "out.work").exists()


def test_memory_is_checked_before_samples_are_made(
    refused: Callable[..., str], draft: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_room(*_: Any) -> None:
        raise BadInput("not enough memory")

    monkeypatch.setattr(sys.modules["pard_onnx.models.adapt.memory"], "require_room", require_room)
    assert "not enough memory" in refused("--draft", draft, "--data", data, "--output", tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(("kind", "precision"), [("gguf", "int8"), ("awq", "int4")])
def test_a_quantized_target_is_exported_for_its_replies(
    refused: Callable[..., str], draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """Integers of a GGUF file are read as floats, as in training; those of other checkpoints are kept."""
    asked: list[tuple[bool, str]] = []

    def export(checkpoint: Checkpoint, source: Any, output: Path, precision: str) -> Path:
        asked.append((checkpoint.quantization is None, precision))
        raise BadInput("enough")

    monkeypatch.setattr("pard_onnx.adapt_samples.exported_once", export)
    quantized_target = tmp_path / kind
    if kind == "gguf":
        gguf_files.write(quantized_target, draft, "Q4_0")
    else:
        quantized.write(quantized_target, kind, layers=1, tokenizer_size=300)
    words = ("--draft", draft, "--target", quantized_target, "--self-distill", "--output", tmp_path / "out")
    refused(*words, "--data", saved(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))
    assert asked == [(kind == "gguf", precision)]


def test_roles_that_nobody_knows(refused: Callable[..., str], draft: Path, tmp_path: Path) -> None:
    for role, fix in (("bot", "write assistant"), ("Assistant", "write assistant"), ("wizard", "known are system")):
        items = [{"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]}]
        shown = refused("--draft", draft, "--data", saved(tmp_path / "data.jsonl", items), "--output", tmp_path / "o")
        assert f"line 1: the role of a message is '{role}'; {fix}" in shown


def test_another_tokenizer(refused: Callable[..., str], draft: Path, data: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", tokenizer_size=299)
    shown = refused("--draft", draft, "--target", other, "--data", data)
    assert "its tokenizer is not that of" in shown and "id 296" in shown


def test_data_without_a_reply(refused: Callable[..., str], draft: Path, tmp_path: Path) -> None:
    for items in ([], [{"prompt": "a"}], [{"messages": []}], [{"conversation": [{"assistant": "a"}]}]):
        shown = refused("--draft", draft, "--data", saved(tmp_path / "data.jsonl", items), "--output", tmp_path / "out")
        assert f"{len(items)} documents, and none has a reply to learn from" in shown
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_template_that_does_not_say_where_replies_are(
    refused: Callable[..., str], draft: Path, data: Path, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    edit_json(draft / "tokenizer_config.json", chat_template=template)
    shown = refused("--draft", draft, "--data", data, "--output", tmp_path / "out")
    assert f"{data} line 1: the chat template does not say where replies are" in shown
    edit_json(draft / "tokenizer_config.json", chat_template=...)
    shown = refused("--draft", draft, "--data", data, "--output", tmp_path / "out")
    assert "line 1: this model has no chat template" in shown


def test_a_missing_package_is_one_line(
    refused: Callable[..., str], draft: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pard_onnx.models.adapt.start", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    shown = refused("--draft", draft, "--data", data)
    assert f"transformers is not installed; run: {install_command('adapt')}" in shown


@pytest.mark.slow
def test_replies_of_the_target_itself(
    trainer: Trainer, demo_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The samples are what the runtime reads and writes for the same conversation."""
    exported = demo_folder("demo-target", "int4")
    items = [{"prompt": f"Complete the code.\ndef {name}(self):\n"} for name in ("close", "read", "size")]
    words = ["--draft", "demo-ar-draft", "--data", saved(tmp_path / "data.jsonl", items), "--self-distill"]
    words += ["--exported", exported, "--max-new-tokens", 24, "--output", tmp_path / "out", "--held-out", 1]
    assert run(*words) == 0
    (call,) = trainer.calls
    found = {tuple(one.ids.tolist()): one.replies for one in (*call.training, *call.held_out)}
    with load(exported, None) as pair:
        text = pair.engine.text
        for item in items:
            messages = [{"role": "user", "content": item["prompt"]}]
            prompt = text.encode_chat(messages)
            result = pair.generate(messages, max_new_tokens=24)
            ended = [2039] if result.finish_reason == "stop" else []
            replies = found.pop((*prompt, *result.tokens, *ended))
            assert np.array_equal(replies, np.arange(len(replies)) >= len(prompt))
    assert not found


def test_the_end_of_a_reply_is_the_templates(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    assert end_of_reply(Text(folder, CHAT_TEMPLATE), (297, 299)) == 299
    assert end_of_reply(Text(folder, CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")), (297, 299)) == 297
    assert end_of_reply(Text(folder, None), (297, 299)) is None
    assert end_of_reply(Text(folder, "{{ raise_exception('no') }}"), (298,)) == 298


@pytest.mark.slow
def test_the_target_is_exported_for_its_replies(trainer: Trainer, tmp_path: Path) -> None:
    data = saved(tmp_path / "data.jsonl", [{"prompt": "def close(self):\n"}] * 3)
    words = ["--shallow", 2, "--target", "demo-target", "--data", data, "--self-distill", "--max-new-tokens", 8]
    assert run(*words, "--output", tmp_path / "out", "--temperature", 0.7, "--held-out", 1) == 0
    (folder,) = (tmp_path / "out.work").glob("target-int8-*")
    assert (folder / "pard_onnx.json").is_file()
    assert trainer.calls[0].settings == Settings()


@pytest.mark.parametrize(("method", "expected"), [("pard", "auto"), ("pard2", "auto"), ("pard", "no")])
def test_a_whole_training(
    draft: Path, target: Path, data: Path, tmp_path: Path, capsys: Any, method: str, expected: str
) -> None:
    """Without the stand-in: what it writes is a draft that the exporter opens."""
    pytest.importorskip("accelerate")
    words = ["--draft", draft, "--target", target, "--data", data, "--method", method, "--output", tmp_path / "out"]
    words += ["--steps", 2, "--draft-length", 3, "--sequence-tokens", 64, "--batch-tokens", 64, "--held-out", 1]
    assert run(*words, "--json", "--expected-acceptance", expected) == 0
    outcome = json.loads(capsys.readouterr().out)["outcome"]
    assert outcome["steps"] == 2
    assert (outcome["acceptance"]["expected_accepted"] is None) == (expected == "no")
    found = Checkpoint.open(tmp_path / "out").as_role("draft")
    assert found.spec.pard is not None and found.spec.pard.spd_type == method
    assert (found.spec.pard.features is not None) == (method == "pard2")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Mean accepted length" in card and ("temperature 1" in card) == (expected != "no")


def test_a_dry_run_does_not_load_the_target(
    draft: Path, target: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("accelerate")
    from pard_onnx.models.adapt import memory, start

    loaded: list[Path] = []

    def load_model(checkpoint: Checkpoint, *more: Any) -> Any:
        loaded.append(checkpoint.path)
        return usual(checkpoint, *more)

    usual = start.loaded_model
    monkeypatch.setattr(start, "loaded_model", load_model)
    words = ("--draft", draft, "--target", target, "--data", data, "--dry-run", "--json", "--method")
    assert run(*words, "pard2") == 0 and loaded == [draft]
    told = json.loads(capsys.readouterr().out)
    whole = memory.estimate(start.start_from(draft), Settings("pard2"), usual(Checkpoint.open(target)))
    assert told["expected_acceptance"] and told["memory"]["total"] == whole.total
    totals = {}
    for expected in ("auto", "no"):
        assert run(*words, "pard", "--expected-acceptance", expected) == 0
        told = json.loads(capsys.readouterr().out)
        totals[told["expected_acceptance"]] = told["memory"]["total"]
    assert totals[True] > totals[False]
    monkeypatch.setattr(memory, "available_memory", lambda device: int(totals[True] * 1.2))  # it fits without a reserve
    assert run(*words, "pard") == 0 and not json.loads(capsys.readouterr().out)["expected_acceptance"]
