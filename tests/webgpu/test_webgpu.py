"""A real provider off the CPU: WebGPU, on a software adapter (.ci/webgpu prepares it, and the exported demo pair).

There the fused attention operator is right for one token a step and wrong for several; plain operators are right.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pard_onnx import PardWarning, load
from pard_onnx.doctor_command import main as doctor
from pard_onnx.runtime.decoding.ahead import AheadPolicy
from pard_onnx.runtime.sessions.device_cache import DeviceKvCache

pytestmark = pytest.mark.webgpu
ARTIFACTS = Path(os.environ.get("PARD_ONNX_WEBGPU_ARTIFACTS", "."))
FUSED, PLAIN = ([str(ARTIFACTS / f"{kind}-{role}") for role in ("target", "draft")] for kind in ("fused", "plain"))
QUANTIZED_AND_HALF = [str(ARTIFACTS / f"{precision}-draft") for precision in ("int4", "fp16")]
TEXT = "def add(a, b):"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found out is kept from test to test, and no longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARD_ONNX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    with load(*FUSED) as pair:
        tokens = pair.generate(TEXT, max_new_tokens=24, draft_length=7).tokens
    with load(*PLAIN) as pair:
        assert pair.generate(TEXT, max_new_tokens=24, draft_length=7).tokens == tokens
    return tokens


def test_the_fused_graph_is_caught_and_runs_token_by_token(expected: tuple[int, ...]) -> None:
    with pytest.warns(PardWarning, match="webgpu computes steps of several tokens of .*fused-target wrongly"):
        pair = load(*FUSED, provider="webgpu", draft_provider="cpu")
    with pair:
        found = pair.generate(TEXT, max_new_tokens=12, draft_length=3)
    assert found.tokens == expected[:12]
    assert (found.stats.widths, found.stats.provider, found.stats.draft_provider) == ((1,), "webgpu", "cpu")


def test_the_portable_graph_runs_as_on_the_cpu_with_its_cache_on_the_device(expected: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PardWarning)
        pair = load(*PLAIN, provider="webgpu")
    with pair:
        found = pair.generate(TEXT, max_new_tokens=24, draft_length=7)
        assert found.tokens == expected
        assert found.stats.widths != (1,) and max(found.stats.accepted) > 1
        assert (found.stats.provider, found.stats.draft_provider) == ("webgpu", "webgpu")
        cache = pair.engine.prefixes.kept[-1].target
        assert isinstance(cache, DeviceKvCache)
        assert {buffer.value.device_name() for buffer in (*cache._past, *cache._present)} != {"cpu"}
        rows = cache.read(0, 8)
        again = pair.engine.new_sequence().target
        again.write(rows)
        np.testing.assert_array_equal(again.read(0, 8), rows)


def test_the_cpu_drafts_while_the_adapter_verifies(expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        AheadPolicy, "pays", lambda *_: True
    )  # else it does not: this adapter is far slower than the draft
    monkeypatch.setattr(AheadPolicy, "length_to_request", lambda self, lag, k: k + 1)
    with load(*PLAIN, provider="webgpu", draft_provider="cpu") as pair:
        found = pair.generate(TEXT, max_new_tokens=12, draft_length=1)
    assert found.tokens == expected[:12]
    assert found.stats.ahead >= found.stats.ahead_used > 0


def test_auto_prefers_the_cpu_to_an_adapter_in_software() -> None:
    with load(*PLAIN, provider="auto") as pair:
        assert pair.choice.provider.key == "cpu"
        assert "webgpu is slow with" in pair.choice.reason and "ms on the CPU" in pair.choice.reason


def test_the_doctor_knows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Quantized graphs run; half precision is an optional feature, which this adapter lacks."""
    assert doctor([FUSED[0], PLAIN[0], *QUANTIZED_AND_HALF, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {(Path(one["artifact"]).name, one["provider"]): one for one in report["artifacts"]}
    results = {name: one["result"] for name, one in found.items()}
    assert results["fused-target", "webgpu"] == "token by token"
    assert results["plain-target", "webgpu"] == results["plain-target", "cpu"] == "right"
    assert results["int4-draft", "webgpu"] == results["fp16-draft", "cpu"] == "right"
    assert results["fp16-draft", "webgpu"] == "fails" and "requires f16" in found["fp16-draft", "webgpu"]["detail"]


def test_without_an_adapter_the_provider_does_not_start() -> None:
    command = [sys.executable, "-m", "pard_onnx.generate_command", "--target", PLAIN[0], "--prompt", TEXT]
    command += ["--max-new-tokens", "4", "--provider", "webgpu"]
    nowhere = {**os.environ, "VK_ICD_FILENAMES": os.devnull, "VK_DRIVER_FILES": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, env=nowhere)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "") and last.startswith("error: provider 'webgpu' cannot start: ")
    done = subprocess.run([*command, "--fallback", "--json"], capture_output=True, text=True, env=nowhere)
    assert done.returncode == 0 and json.loads(done.stdout)["provider"] == "cpu"
