"""The arguments of a deployment on Ray: as text or typed, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("starlette")

from pard_onnx.models.errors import BadInput
from pard_onnx.serve.ray.arguments import Arguments


def test_arguments_of_a_command_line_are_those_of_a_file() -> None:
    texts = {"target": "T", "max_live": "3", "timeout": "2.5", "strict": "true", "cors": "http://a.b,http://c.d"}
    typed = {"target": "T", "max_live": 3, "timeout": 2.5, "strict": True, "cors": ["http://a.b", "http://c.d"]}
    assert Arguments.read(texts, {}) == Arguments.read(typed, {})
    assert Arguments.read(texts, {}).settings().cors == ("http://a.b", "http://c.d")


def test_the_key_of_the_environment_is_used_and_not_shown() -> None:
    found = Arguments.read({"target": "T"}, {"PARD_API_KEY": "secret"})
    assert found.settings().api_key == "secret"
    assert "secret" not in repr(found)
    assert Arguments.read({"target": "T", "api_key": "own"}, {"PARD_API_KEY": "secret"}).api_key == "own"


def test_a_replica_has_as_many_threads_as_cores() -> None:
    assert Arguments(target="T", num_cpus=8).settings().load["threads"] == 8
    assert Arguments(target="T", num_cpus=0.5).settings().load["threads"] == 1
    assert Arguments(target="T", num_cpus=8, threads=2).settings().load["threads"] == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "target=DIR"),
        ({"target": "T", "models": "M"}, "one of them alone"),
        ({"models": "M", "draft": "D"}, "leave out draft"),
        ({"target": "T", "max_replica": "4"}, "do you mean max_replicas?"),
        ({"target": "T", "max_replicas": "many"}, "max_replicas.*'many'"),
        ({"target": "T", "max_replicas": "²"}, "max_replicas"),
        ({"target": "T", "min_replicas": 0}, "min_replicas"),
        ({"target": "T", "min_replicas": 3, "max_replicas": 2}, "max_replicas is 2"),
        ({"target": "T", "max_live": -1}, "max_live"),
        ({"target": "T", "max_live": 0}, "max_live"),
        ({"target": "T", "num_cpus": "nan"}, "num_cpus"),
        ({"target": "T", "timeout": 0}, "timeout"),
        ({"target": "T", "target_ongoing_requests": 0}, "target_ongoing_requests"),
        ({"target": "T", "ingress_replicas": 0}, "ingress_replicas"),
        ({"target": "T", "strict": "maybe"}, "strict.*'maybe'"),
        ({"target": "T", "cors": 3}, "cors"),
        ({"target": "T", "cors": "example.org"}, "cors.*example.org"),
        ({"target": 3}, "target"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        Arguments.read(given, {})
    assert "\n" not in str(caught.value)
