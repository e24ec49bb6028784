"""pard-deploy: the models that are found, what each engine gets, quoting, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stand_in_hub import Hub
from tiny import SHA

from pard_onnx.deploy_command import main
from pard_onnx.models import demo
from pard_onnx.models.hub import DEMO
from pard_onnx.models.manifest import (
    AdapterSource,
    Manifest,
    MeasuredFormat,
    Quantization,
    Source,
    Throughput,
)
from pard_onnx.serve.engines.command import Command, powershell_quoted
from pard_onnx.serve.engines.plan import LEAST, MOST, acceptance, draft_length, planned
from pard_onnx.serve.engines.served_model import served_model
from pard_onnx.serve.engines.table import ENGINES, vllm, yaml_text

QWEN3, PARD = "Qwen/Qwen3-8B", "amd/PARD-Qwen3-0.6B"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARD_ONNX_MODELS", str(tmp_path / "library"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def hub(online: object) -> None:
    """Configs of a Qwen3 pair whose padding differs, and of a Llama model."""
    config = {"model_type": "qwen3", "vocab_size": 151936}
    draft = config | {"pard_token": 151669, "spd_type": "pard", "vocab_size": 152064}
    for name, value in ((QWEN3, config), (PARD, draft), ("org/llama", config | {"model_type": "llama"})):
        Hub.repositories[name] = {"config.json": json.dumps(value).encode(), "model.safetensors": b"weights"}


def deployed(capsys: Capture, *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_vllm(hub: None, capsys: Capture) -> None:
    found = deployed(capsys, "--target", QWEN3, "--engine", "vllm")
    words = shlex.split(found["commands"][0]["posix"])
    assert words[:5] == ["vllm", "serve", QWEN3, "--revision", SHA] and words[5] == "--speculative-config"
    config = {
        "method": "draft_model",
        "model": PARD,
        "num_speculative_tokens": 8,
        "parallel_drafting": True,
        "revision": SHA,
    }
    assert json.loads(words[6]) == json.loads(found["files"]["speculative_config.json"]) == config
    dotted = found["commands"][0]["powershell_arguments"][5:]
    read = dict(zip((key.removeprefix("--speculative-config.") for key in dotted[::2]), dotted[1::2], strict=True))
    assert {
        key: value if key in ("method", "model", "revision") else json.loads(value) for key, value in read.items()
    } == config
    assert '"' not in found["commands"][0]["powershell"]
    assert any("vocab_size is another one (152064, the target's is 151936)" in note for note in found["notes"])
    assert any(
        "8 drafts a round is a starting point (published results of PARD use 8 to 12" in n for n in found["notes"]
    )
    assert not [path for path in Hub.asked if path.endswith("safetensors")]


def test_tensorrt_llm(hub: None, capsys: Capture, tmp_path: Path) -> None:
    output = tmp_path / "neu é" / "it's"
    arguments = ["--target", QWEN3, "--engine", "tensorrt-llm", "--draft-length", "5", "--output", str(output)]
    found = deployed(capsys, *arguments)
    assert found["commands"][0]["arguments"] == ["trtllm-serve", QWEN3, "--config", "pard.yaml"]
    assert yaml.safe_load((output / "pard.yaml").read_text(encoding="utf-8")) == {
        "revision": SHA,
        "speculative_config": {
            "decoding_type": "PARD",
            "max_draft_len": 5,
            "speculative_model": PARD,
            "mask_token_id": 151669,
        },
    }
    assert any(f"hf download {PARD} --revision {SHA}" in note for note in found["notes"])
    assert sorted(path.name for path in output.iterdir()) == ["pard.yaml", "serve.ps1", "serve.sh"]
    assert "is there already" in refused(capsys, *arguments)


def test_sglang_has_no_pard(hub: None, capsys: Capture) -> None:
    found = deployed(capsys, "--target", QWEN3, "--engine", "sglang")
    assert (found["runs_pard"], found["draft"], found["draft_length"]) == (False, None, None)
    assert f"SGLang cannot run PARD drafts, so {PARD} is not used" in found["notes"][0]
    kinds = [one["arguments"] for one in found["commands"]]
    assert [words[words.index("--speculative-algorithm") + 1] for words in kinds[:-1]] == ["EAGLE3", "DFLASH", "NGRAM"]
    assert "--speculative-algorithm" not in kinds[-1] and not any(PARD in words for words in kinds)
    assert len(deployed(capsys, "--target", "org/llama", "--engine", "sglang")["commands"]) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_shown_text_can_be_pasted(engine: str, hub: None, capsys: Capture) -> None:
    for shell in ("posix", "powershell"):
        assert main(["--target", QWEN3, "--engine", engine, "--shell", shell]) == 0
        lines = capsys.readouterr().out.splitlines()
        commands = [line for line in lines if re.match(r"(vllm|trtllm-serve|python3) ", line)]
        assert commands and all(
            line.startswith("#") for line in lines if line not in commands and engine != "tensorrt-llm"
        )


def test_offline_the_names_suffice(capsys: Capture) -> None:
    found = deployed(capsys, "--target", "meta-llama/Llama-3.3-70B-Instruct", "--engine", "vllm")
    assert found["draft"] == {"name": "amd/PARD-Llama-3.2-1B", "revision": None, "local": False}
    assert any("it was not checked that the models fit" in note for note in found["notes"])


def test_a_hub_that_does_not_answer_is_not_waited_for(
    online: object, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)  # between the attempts of huggingface_hub
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = deployed(capsys, "--target", QWEN3, "--engine", "vllm")
    assert found["draft"]["name"] == PARD and waits == []
    assert any("the hub cannot be reached" in note for note in found["notes"])


def test_refused(hub: None, capsys: Capture, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    tiny(tmp_path / "target")
    tiny(tmp_path / "draft", role="draft")
    (tmp_path / "empty").mkdir()
    cases: dict[tuple[str, ...], str] = {
        (PARD,): "is a PARD draft; name it with --draft",
        (QWEN3, "--draft", QWEN3): f"is no PARD draft; {PARD} is the published one",
        ("org/llama",): "no published PARD draft is known for it",
        (
            "org/llama",
            "--draft",
            PARD,
        ): "is a draft for models of the family 'qwen3' or 'qwen3_moe', and org/llama is of",
        (QWEN3, "--draft", str(tmp_path / "draft")): "is a draft for models of the family 'qwen2'",
        (QWEN3, "--draft", "org/absent"): "neither a folder here nor a repository",
        (QWEN3, "--revision", "v9"): "that revision is not",
        (QWEN3, "--draft-length", "0"): "--draft-length must be from 1",
        ("gpt2",): "neither a folder nor a hub id",
        ("",): "neither a folder nor a hub id",
        ("a\0b",): "null character",
        ("org/name/file.gguf",): "neither a folder nor a hub id",
        (str(tmp_path / "empty"),): "has no config.json",
        (str(tmp_path / "target"), "--revision", "main"): "is a local folder, which has no revisions",
        ("org/llama", "--draft-revision", "main"): "of which draft?",
    }
    for arguments, words in cases.items():
        assert words in refused(capsys, "--engine", "vllm", "--target", *arguments), arguments


def test_local_folders_are_told(capsys: Capture, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    target, draft = tiny(tmp_path / "a b's"), tiny(tmp_path / "draft", role="draft")
    found = deployed(capsys, "--target", str(target), "--draft", str(draft), "--engine", "vllm")
    told = [note for note in found["notes"] if "is a folder of this machine; copy it" in note]
    assert [note.partition(" is a folder")[0] for note in told] == [str(target), str(draft)]
    assert shlex.split(found["commands"][0]["posix"])[2] == str(target)
    assert str(draft) in json.loads(shlex.split(found["commands"][0]["posix"])[4])["model"]


def test_the_shipped_pair(capsys: Capture) -> None:
    found = deployed(capsys, "--target", "demo-target", "--engine", "tensorrt-llm")
    assert (found["target"]["name"], found["draft"]["name"]) == (str(DEMO["demo-target"]), str(DEMO["demo-draft"]))


@pytest.mark.parametrize("target", ["demo-target", str(demo.EXPORTED_TARGET)])
def test_the_shipped_pair_without_its_checkpoints(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """As wheels have it."""
    monkeypatch.setitem(DEMO, "demo-target", tmp_path / "absent")
    assert "demo-target: wheels have no checkpoints" in refused(capsys, "--engine", "vllm", "--target", target)


# --- exported folders


@pytest.fixture
def exported(pair_folders: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """exported("target" | "draft", **changes): a toy export whose manifest has these changes."""

    def make(role: str, **changes: Any) -> Path:
        folder = tmp_path / f"{role}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(pair_folders[role == "draft"], folder)
        replace(Manifest.read(folder), **changes).write(folder)
        return folder

    return make


def test_exported_folders_know_their_checkpoints(exported: Callable[..., Path], capsys: Capture) -> None:
    tried = (MeasuredFormat("int8-rtn", 1, 7, 0.1, 3.0, 50.0), MeasuredFormat("int4-rtn", 1, 6, 0.1, 2.5, 40.0))
    chosen = Quantization("int8-rtn", "rtn", throughput=Throughput("big", "int4", 20.0, tried))
    target = exported("target", source=Source("org/big", SHA))
    draft = exported("draft", source=Source("org/small"), quantization=chosen)
    found = deployed(capsys, "--target", str(target), "--draft", str(draft), "--engine", "vllm")
    assert found["target"] == {"name": "org/big", "revision": SHA, "local": False}
    assert found["draft"] == {"name": "org/small", "revision": None, "local": False}
    assert found["draft_length"] == 6
    assert any("measured: 3 tokens a round with 7 drafts, beside big" in note for note in found["notes"])


@pytest.mark.parametrize("source", [Source("my folder"), Source("org/name/model-Q4_0"), Source("--flag/x")])
def test_exports_of_unknown_sources(source: Source, exported: Callable[..., Path], capsys: Capture) -> None:
    line = refused(capsys, "--target", str(exported("target", source=source)), "--draft", PARD, "--engine", "vllm")
    assert "the folder does not say where that is; name the checkpoint itself" in line


def test_exports_with_an_adapter(exported: Callable[..., Path], capsys: Capture) -> None:
    folder = exported("target", source=Source("org/big", adapter=AdapterSource("org/lora", "0" * 64)))
    assert "has the adapter org/lora merged" in refused(capsys, "--target", str(folder), "--engine", "vllm")


def test_exports_with_other_tokens(
    exported: Callable[..., Path], write_artifact: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    target = exported("target", source=Source("org/big"))
    draft = write_artifact(tmp_path / "other", "draft", text="pack my box with five dozen liquor jugs")
    replace(Manifest.read(draft), source=Source("org/other")).write(draft)
    line = refused(capsys, "--target", str(target), "--draft", str(draft), "--engine", "vllm")
    assert "its tokenizer is not that of" in line


# --- pure parts


@given(st.floats(0.01, 0.99), st.integers(1, 16))
def test_acceptance_is_what_gives_the_measured_length(share: float, length: int) -> None:
    accepted = sum(share**k for k in range(length + 1))
    assert acceptance(accepted, length) == pytest.approx(share, abs=1e-3)


@given(st.floats(-1e300, 1e300), st.integers(-(1 << 63), (1 << 63) - 1))
def test_draft_lengths_stay_in_their_range(accepted: float, length: int) -> None:
    model = replace(
        served_model("demo-draft"),
        throughput=Throughput("t", "int4", 1.0, (MeasuredFormat("r", 1, length, 0.1, accepted, 1.0),)),
    )
    assert LEAST <= draft_length(model)[0] <= MOST


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_yaml_reads_the_same_text(text: str) -> None:
    assert yaml.safe_load(f"name: {yaml_text(text)}") == {"name": text}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), max_size=4))
def test_shells_read_the_same_arguments(words: list[str]) -> None:
    command = Command("", ("run", *words))
    assert shlex.split(command.posix) == ["run", *words]
    assert powershell_words(command.powershell) == ["run", *words]


def powershell_words(line: str) -> list[str]:
    """The words of a line of plain words and texts in single quotes; PowerShell has five characters for these."""
    quote, other = "['\u2018-\u201b]", "[^'\u2018-\u201b]"
    word = rf"{quote}(?:{other}|{quote}{{2}})*{quote}|[A-Za-z0-9_/-]+"
    found = re.findall(rf"(?:^| )({word})(?=$| )", line, re.DOTALL)
    return [re.sub(f"({quote}){quote}", r"\1", one[1:-1]) if re.match(quote, one) else one for one in found]


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
def test_sh_starts_it_with_the_same_arguments(tmp_path: Path, capsys: Capture, tiny: Callable[..., Path]) -> None:
    target, draft = tiny(tmp_path / 'it\'s $HOME `x` "q" é'), tiny(tmp_path / "draft", role="draft")
    out = tmp_path / "out"
    found = deployed(capsys, "--target", str(target), "--draft", str(draft), "--engine", "vllm", "--output", str(out))
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n")
    fake.chmod(0o755)
    done = subprocess.run(
        [out / "serve.sh"], env={"PATH": f"{fake.parent}:/bin:/usr/bin"}, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [str(out), *found["commands"][0]["arguments"][1:]]


def test_powershell_quotes() -> None:
    assert powershell_quoted("it\u2019s") == "'it\u2019\u2019s'"
    assert powershell_quoted("--speculative-config.model") == "'--speculative-config.model'"
    assert powershell_quoted("") == "''"


def test_a_commit_that_reads_as_a_number_is_left_out_for_powershell() -> None:
    plan = planned("demo-target")
    assert plan.draft is not None
    draft = replace(plan.draft, revision="1234567890" * 4)
    found = vllm(replace(plan, draft=draft))
    assert not any("revision" in word for word in found.commands[0].powershell_arguments)
    assert json.loads(found.commands[0].arguments[-1])["revision"] == draft.revision
    assert any("cannot be given without double quotes" in note for note in found.notes)
