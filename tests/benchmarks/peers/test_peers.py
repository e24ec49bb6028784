"""Peers: the table, workers that misbehave, and the real frameworks where they are installed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pard_onnx import load
from pard_onnx.benchmarks.peers.peer import PEERS, Models, Peer, PeerRun, Task, missing, peer_by_name, run_peer
from pard_onnx.benchmarks.peers.process import FOLDER, events
from pard_onnx.export.exporter import Job, export
from pard_onnx.models import demo
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Source
from pard_onnx.models.precision import Precision

TASK = Task(prompts=((5, 6, 7), (8, 9)), max_new_tokens=4, eos_ids=(2,), threads=1)
# A worker that decodes without a model: each token is one more than the one before; `%s`: what it does first.
COUNTING = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from worker_protocol import serve

def load(request):
    %s
    def generate(prompt, limit, emit, draft_length):
        for token in range(prompt[-1] + 1, prompt[-1] + 1 + limit + 3):
            emit([token])
    return generate

serve(("numpy", "nothing-of-that-name"), load)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """fake(script, ...) -> what a peer with that worker gives."""

    def ran(script: str, task: Task = TASK, **options: Any) -> PeerRun:
        worker = tmp_path / "fake_worker.py"
        worker.write_text(script)
        peer = replace(PEERS["transformers"], name="fake", worker=str(worker), modules=("json",))
        return run_peer(peer, "plain", Models(tmp_path, tmp_path / "cache"), task, **options)

    return ran


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"no peer 'llamacpp'; did you mean llama.cpp\? known: transformers, .*openvino"):
        peer_by_name("llamacpp")
    with pytest.raises(BadInput, match=r"transformers has no mode 'asisted'; did you mean assisted\? known: plain,"):
        peer_by_name("transformers").mode("asisted")
    with pytest.raises(BadInput, match=r"llama.cpp has no format 'int3'; known: q4_0, q8_0"):
        peer_by_name("llama.cpp").format("int3")


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_the_table_is_whole(peer: Peer) -> None:
    assert (FOLDER / peer.worker).is_file()
    assert peer.mode("plain").draft is False
    assert peer.format(None) == peer.formats[0]
    assert peer_by_name(peer.name) is peer


def test_tokens_are_cut_and_timed(fake: Any) -> None:
    found = fake(COUNTING % "pass")
    assert [sample.tokens for sample in found.samples] == [(8, 9, 10, 11), (10, 11, 12, 13)]
    assert all(0 < sample.first_seconds <= sample.total_seconds for sample in found.samples)
    assert found.failed is found.skipped is None
    assert [name for name, _ in found.versions] == ["numpy"]
    assert found.peak_bytes > 1_000_000
    ended = fake(COUNTING % "pass", replace(TASK, eos_ids=(10,)))
    assert [sample.tokens for sample in ended.samples] == [(8, 9), ()]


def test_the_fastest_draft_length_is_taken(fake: Any) -> None:
    slower = COUNTING.replace("emit([token])", "import time; time.sleep(0.005 * abs(draft_length - 4)); emit([token])")
    assert fake(slower % "pass", draft_lengths=(2, 4, 8)).draft_length == 4
    assert fake(slower % "pass", draft_lengths=(8,)).draft_length == 8
    assert fake(COUNTING % "pass").draft_length == 0


def test_what_a_framework_prints_is_no_event(fake: Any) -> None:
    event = '{"event": "end", "peak_bytes": 1, "draft_length": 0}'
    noise = f"""import os; print("hello"); os.write(1, b'{event}\\n'); os.system("echo 1")"""
    assert len(fake(COUNTING % noise).samples) == 2


def test_workers_make_forms(tmp_path: Path) -> None:
    worker, output = tmp_path / "worker.py", tmp_path / "form"
    made = COUNTING % "pass"
    made = made.replace("load)\n", "load, lambda form: open(form['output'], 'w').write('form'))\n")
    worker.write_text(made)
    (event,) = events(Path(sys.executable), worker, {"form": {"output": str(output)}}, 60.0)
    assert event == {"event": "end"} and output.read_text() == "form"
    (event,) = events(Path(sys.executable), worker, {"form": {}}, 60.0)
    assert event == {"event": "failed", "reason": "KeyError: 'output'"}


@pytest.mark.parametrize(
    ("script", "reason"),
    (
        ("print('hello'); raise ValueError('no such thing')", "ended with exit code 1: ValueError: no such thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9, as when memory runs out"),
        ('print(\'{"event": "sample"}\')', "its worker talks nonsense: tokens: is missing"),
        ('print(\'{"event": "song"}\')', "its worker talks nonsense: an event 'song'"),
        ('print(\'{"event": "end", "peak_bytes": null, "draft_length": 0}\')', "ended after 0 of 2 prompts"),
        ("print('[1]')", "ended with exit code 0"),
        (COUNTING % "raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ),
)
def test_workers_that_break_are_told_by_name(fake: Any, script: str, reason: str) -> None:
    if "SIGKILL" in script and os.name != "posix":
        pytest.skip("no signals")
    assert fake(script).failed == reason


def test_a_hung_worker_is_ended(fake: Any, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    assert fake(script, silence=2.0).failed == "no word from it for 2 seconds"
    assert not alive(int(mark.read_text()))


def test_breaking_off_ends_the_worker(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text('import os, time; print(\'{"event": "ready"}\', flush=True); time.sleep(600)')
    told = events(Path(sys.executable), script, {}, 60.0)
    assert next(told) == {"event": "ready"}
    told.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_worker_ends_with_whoever_asked(tmp_path: Path) -> None:
    mark, script = tmp_path / "pid", tmp_path / "worker.py"
    script.write_text(COUNTING % f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    request = {"mode": "plain", "models": {}, "threads": 1, "prompts": [[1]], "max_new_tokens": 1, "eos_ids": []}
    asks = f"""
from pathlib import Path; from pard_onnx.benchmarks.peers.process import events
list(events(Path({sys.executable!r}), Path({str(script)!r}), {request | {"warm_up": 0}!r}, 600.0))
"""
    with subprocess.Popen([sys.executable, "-c", asks]) as parent:
        wait_for(lambda: mark.exists() and mark.read_text())
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(int(mark.read_text())))


def test_what_is_not_there_is_skipped_by_name(tmp_path: Path, fake: Any) -> None:
    peer = replace(PEERS["llama.cpp"], modules=("json", "no_such_module"))
    models = Models(tmp_path, tmp_path / "cache")
    found = run_peer(peer, "plain", models, TASK)
    assert found.skipped == "no_such_module is not installed; run: pip install llama-cpp-python"
    assert run_peer(peer, "speculative", models, TASK).skipped == (
        "speculative decoding needs an autoregressive draft, and none was given"
    )
    assert fake(COUNTING % "import no_such_module.part").skipped == "no_such_module is not installed"
    with pytest.raises(BadInput, match="is no Python"):
        missing(peer, tmp_path / "python")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(seen: Any) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def demo_task() -> Task:
    with_eos = Checkpoint.open(demo.TARGET).spec.vocabulary.eos_ids
    return Task(prompts=((312, 284, 1329, 1025), (258, 331, 324)), max_new_tokens=12, eos_ids=with_eos, threads=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="module")
def ours(demo_task: Task, cache: Path) -> list[tuple[int, ...]]:
    """Greedy tokens of our runtime in floats, which each peer must give too."""
    artifact, precision = cache / "ours", Precision.__args__[0]  # type: ignore[attr-defined]
    export(Job(Checkpoint.open(demo.TARGET), Source("demo-target"), artifact, precision, verify=False))
    with load(artifact) as pair:
        prompts = [list(prompt) for prompt in demo_task.prompts]
        return [pair.generate(p, max_new_tokens=12, exact=False).tokens for p in prompts]


@pytest.mark.parametrize(
    ("name", "mode", "form"),
    (
        ("transformers", "plain", "float32"),
        ("transformers", "assisted", "float32"),
        ("onnxruntime-genai", "plain", "fp32"),
        ("onnxruntime-genai", "speculative", "fp32"),
        ("onnxruntime-genai", "prompt-lookup", "fp32"),
        ("llama.cpp", "plain", "f32"),
        ("llama.cpp", "speculative", "f32"),
        ("llama.cpp", "prompt-lookup", "f32"),
        ("openvino", "speculative", "q8_0"),
    ),
)
def test_real_peers_give_the_same_greedy_tokens(
    demo_task: Task, cache: Path, ours: list[tuple[int, ...]], name: str, mode: str, form: str
) -> None:
    peer = peer_by_name(name)
    if reason := missing(peer):
        pytest.skip(reason)
    models = Models(demo.TARGET, cache, draft=demo.TARGET)  # its own draft: same vocabulary
    found = run_peer(peer, mode, models, demo_task, format=form)
    assert (found.failed, found.skipped) == (None, None)
    assert [sample.tokens for sample in found.samples] == ours
    assert len(list(cache.glob("*"))) == len({path.name.lstrip(".") for path in cache.glob("*")})  # nothing half made


def test_pairs_of_other_vocabulary_rows_are_refused_by_genai(demo_task: Task, cache: Path) -> None:
    peer = peer_by_name("onnxruntime-genai")
    if reason := missing(peer):
        pytest.skip(reason)
    found = run_peer(peer, "speculative", Models(demo.TARGET, cache, draft=demo.DRAFT), demo_task, format="fp32")
    assert found.failed and "share the same vocabulary" in found.failed
