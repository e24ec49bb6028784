"""The adapter for lm-evaluation-harness beside the harness's own model of transformers, on tasks without a network."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra eval)")

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from pard_onnx import BadInput, load  # noqa: E402
from pard_onnx.benchmarks.quality.harness import main  # noqa: E402
from pard_onnx.benchmarks.quality.harness_model import NAME, PardOnnx, generation_options  # noqa: E402
from pard_onnx.models import demo  # noqa: E402
from pard_onnx.models.demo import corpus  # noqa: E402

# The harness's libraries warn of their own parts
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]
Folder = Callable[[str, str], Path]
DOCS = [
    {"q": "def add(a, b):\n    return", "choices": [" a + b", " a", " None"], "a": 0, "body": "import os\n"},
    {"q": "import ", "choices": ["os", "sys\n", "é 🙂"], "a": 1, "body": "class A:\n    pass\n"},
    {"q": "class Node", "choices": ["(object):\n    pass", ":", "Node"], "a": 1, "body": "x = 1\n" * 40},
]
TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: a
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{body}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
task: writing
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def ours(demo_folder: Folder) -> Iterator[PardOnnx]:
    with load(demo_folder("demo-target", "fp32"), demo_folder("demo-draft", "int8")) as pair:
        yield PardOnnx(pair)


@pytest.fixture(scope="module")
def theirs(ours: PardOnnx) -> Any:
    return HFLM(str(demo.TARGET), dtype=torch.float32, device="cpu", max_length=ours.max_length, batch_size=1)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def long_text(least: int) -> str:
    text = ""
    for module in corpus.modules():
        text += "".join(head + body for head, body in corpus.functions(module))
        if len(text) > least:
            break
    return text


def test_log_likelihoods_are_those_of_the_harness_own_model(ours: PardOnnx, theirs: Any) -> None:
    pairs = [
        *((doc["q"], choice) for doc in DOCS for choice in doc["choices"]),  # type: ignore[attr-defined]
        ("", "def f():"),
        ("x = (", "1, 2)  \n"),
        ("def f(self):\n    ", "return self"),
        (long_text(30_000)[:20_000], " return self._value"),  # longer than the model reads
    ]
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_windows_are_those_of_the_harness_own_model(ours: PardOnnx, theirs: Any) -> None:
    texts = [("def f(x):\n    return x\n",), (long_text(30_000)[:18_000],)]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    direct = ours.pair.score([ours.prefix_token_id], ours.tok_encode(texts[0][0]))
    assert found[0] == pytest.approx(direct.logprob, abs=1e-6)
    assert len(ours.tok_encode(texts[1][0])) > 2 * ours.max_length


def test_texts_are_those_of_the_harness_own_model(ours: PardOnnx, theirs: Any) -> None:
    asked = [
        (doc["q"], {"until": until, "max_gen_toks": 32, "do_sample": False})
        for doc in DOCS
        for until in (["\n\n"], ["return", "pass"], [])
    ]
    expected = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert ours.generate_until(instances("generate_until", asked), disable_tqdm=True) == expected


def test_drawn_texts_differ_between_repeats_and_not_between_runs(ours: PardOnnx) -> None:
    asked = [("def ", {"until": [], "max_gen_toks": 24, "temperature": 1.0})] * 4
    first = ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert len(set(first)) > 1
    assert ours.generate_until(instances("generate_until", asked), disable_tqdm=True) == first


def test_the_command_runs_tasks_of_a_folder(
    demo_folder: Folder, tmp_path: Path, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tasks / f"{name}.yaml").write_text(text + source)
    target, draft = demo_folder("demo-target", "fp32"), demo_folder("demo-draft", "int8")
    out = tmp_path / "results.json"
    names = ",".join(TASKS)
    arguments = ["--target", str(target), "--draft", str(draft), "--tasks", names, "--include-path", str(tasks)]
    assert main([*arguments, "--output", str(out)]) == 0
    assert "word_perplexity" in capsys.readouterr().out
    found = json.loads(out.read_text())["results"]
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    expected = lm_eval.simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager)["results"]
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    limited = lm_eval.simple_evaluate(
        NAME, {"target": str(target)}, tasks=["choice"], limit=2, batch_size=8, device="cpu", task_manager=manager
    )
    assert limited["n-samples"]["choice"]["effective"] == 2


def test_conversations(ours: PardOnnx) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f():"}]
    if ours.chat_template(True) is None:
        pytest.skip("the shipped target has no chat template")
    begun = ours.apply_chat_template(chat, add_generation_prompt=False)
    assert begun.endswith("def f():")
    assert ours.apply_chat_template(chat[:1]).startswith(begun[: begun.index("hi") + 2])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"max_new_tokens": 9, "stop": []}),
        ({"until": "x", "max_tokens": 3}, {"max_new_tokens": 3, "stop": ["x"]}),
        ({"until": ["", "x"], "do_sample": False, "temperature": 0.7}, {"max_new_tokens": 9, "stop": ["x"]}),
        ({"do_sample": True}, {"max_new_tokens": 9, "stop": [], "temperature": 1.0}),
        ({"temperature": 0.5, "top_k": 3}, {"max_new_tokens": 9, "stop": [], "temperature": 0.5, "top_k": 3}),
    ],
)  # fmt: skip
def test_arguments_of_tasks(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    assert generation_options(arguments, 9) == options


def test_what_it_does_not_know_is_refused(ours: PardOnnx) -> None:
    with pytest.raises(BadInput, match="unknown option num_beams"):
        ours.generate_until(instances("generate_until", [("x", {"num_beams": 4})]), disable_tqdm=True)
    with pytest.raises(BadInput, match="max_gen_toks 4000 leaves no room"):
        ours.generate_until(instances("generate_until", [("x", {"max_gen_toks": 4000})]), disable_tqdm=True)


def test_a_task_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "nowhere", "--tasks", "no_such_task"]) == 2
    assert "--tasks 'no_such_task': no such task" in capsys.readouterr().err
