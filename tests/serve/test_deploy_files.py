"""The files in deploy/: what they run, copy and install exists, and their options are those of the commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pard_onnx.serve_command import parser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]
ENVIRONMENT = ("PARD_ONNX_MODELS", "PARD_ONNX_CACHE")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and their arguments."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> list[list[tuple[str, str]]]:
    out: list[list[tuple[str, str]]] = []
    for one in instructions():
        if one[0] == "FROM":
            out.append([])
        out[-1].append(one)
    return out


def argument(stage: list[tuple[str, str]], name: str) -> str:
    """The arguments of the stage's only instruction of this name."""
    (found,) = (rest for word, rest in stage if word == name)
    return found


def shell(stage: list[tuple[str, str]]) -> str:
    return "\n".join(rest for word, rest in stage if word == "RUN")


def test_the_dockerfile_installs_extras_that_exist() -> None:
    build, _ = stages()
    (extras,) = re.findall(r'"\.\[(.*?)\]"', shell(build))
    assert {"cpu", "serve"} <= set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
    (constraints,) = re.findall(r"-c (\S+\.txt)", shell(build))
    assert f"!/{constraints}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_image_has_no_compiler_and_no_root() -> None:
    build, image = stages()
    assert "g++" in shell(build)
    assert "apt-get" not in shell(image) and "pip" not in shell(image)
    assert argument(build, "FROM").removesuffix(" AS build") == argument(image, "FROM") == "python:3.12-slim"
    assert f"--uid {argument(image, 'USER')}" in shell(image)
    assert argument(image, "USER") != "0"
    words = [word for word, _ in image]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))


def test_the_image_starts_a_server_that_others_reach() -> None:
    _, image = stages()
    entry, default = (json.loads(argument(image, name)) for name in ("ENTRYPOINT", "CMD"))
    assert entry[0] in COMMANDS
    options = parser().parse_args(entry[1:] + default)
    assert options.host == "0.0.0.0"
    assert options.models is not None
    assert options.api_key is None  # nobody's key is in the image
    assert argument(image, "EXPOSE") == str(options.port)
    _, _, check = argument(image, "HEALTHCHECK").partition("CMD ")
    assert f":{options.port}/health" in json.loads(check)[-1]
    compile(json.loads(check)[-1], "HEALTHCHECK", "exec")
    environment = dict(one.split("=", 1) for one in shlex.split(argument(image, "ENV")))
    assert environment["PARD_ONNX_MODELS"] in shell(image)  # the folder is made
    assert environment["PARD_ONNX_CACHE"].startswith("/tmp/")  # of whichever user the container has


def test_the_builder_gets_what_the_package_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {line[2:] for line in patterns if line.startswith("!/")}
    assert all((ROOT / name).exists() for name in allowed)
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert {"pyproject.toml", "setup.py", *folders} <= allowed
    read = {"README.md", "packaging/long_description.py"}  # by setup.py
    assert read | {*PROJECT["project"]["license-files"]} <= allowed


def unit() -> dict[str, list[str]]:
    """The settings of the unit's section Service."""
    text = (DEPLOY / "pard-serve.service").read_text()
    service = text.partition("[Service]")[2].partition("[Install]")[0]
    out: dict[str, list[str]] = {}
    for line in service.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            out.setdefault(name, []).append(value)
    return out


def test_the_service_runs_the_command() -> None:
    found = unit()
    environment = dict(one.split("=", 1) for one in found["Environment"])
    assert set(ENVIRONMENT) < environment.keys()
    (start,) = found["ExecStart"]
    path, *rest = start.split()
    assert Path(path).name in COMMANDS
    words = [environment[word[1:]] if word.startswith("$") else word for word in rest]
    options = parser().parse_args(shlex.split(" ".join(words)))
    assert options.host == "127.0.0.1"
    assert found["SuccessExitStatus"] == ["130 143"]
    assert found["RestartPreventExitStatus"] == ["2"]
    examples = (DEPLOY / "serve.env").read_text()
    for name, value in re.findall(r"^#(\w+)=(.*)$", examples, re.MULTILINE):
        assert name in ("PARD_API_KEY", *environment)
        if name == "PARD_SERVE_OPTIONS":
            parser().parse_args(shlex.split(value))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    text = (DEPLOY / "pard-serve.service").read_text()
    copy = tmp_path / "pard-serve.service"
    copy.write_text(text.replace(unit()["ExecStart"][0].split()[0], "/bin/true"))  # the program must exist
    verify = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=30)
    assert (verify.returncode, verify.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=25", copy]
    exposure = subprocess.run(security, capture_output=True, text=True, timeout=30)
    assert exposure.returncode == 0, exposure.stdout.splitlines()[-1]


# ---- Lemonade


def resolved(arguments: list[str], tokens: dict[str, str]) -> list[str]:
    """The arguments of a backend, as Lemonade makes them: one with a token that has no value is left out."""
    out = []
    for one in arguments:
        names = re.findall(r"\{(.+?)\}", one)
        if all(name in tokens for name in names):
            out.append(re.sub(r"\{(.+?)\}", lambda found: tokens[found[1]], one))
    return out


TOKENS = {"resolved_path": "/m/target", "model_name": "user.Mine", "host": "127.0.0.1", "port": "8123"}


@pytest.mark.parametrize("draft", [None, "/m/draft"])
def test_lemonade_starts_the_command(draft: str | None) -> None:
    backend = json.loads((DEPLOY / "lemonade" / "pard-onnx.json").read_text())
    assert isinstance(backend["display_name"], str) and backend["capabilities"]
    assert set(backend["endpoints"]) <= set(backend["capabilities"])
    (platform,) = backend["platforms"].values()
    assert platform["command"] in COMMANDS
    tokens = TOKENS | ({"checkpoint:draft": draft} if draft else {})
    options = parser().parse_args(resolved(platform["args"], tokens))
    assert (options.target, options.draft, options.name) == ("/m/target", draft, "user.Mine")
    assert (options.host, options.port) == ("127.0.0.1", 8123)
    assert options.grace < 5  # seconds after SIGTERM in which Lemonade kills a backend
    assert all(f"{flag}=" in " ".join(platform["args"]) for flag in backend["protected_flags"])


def test_the_endpoints_of_lemonades_backend_exist() -> None:
    pytest.importorskip("starlette")
    from pard_onnx.serve.app import ROUTES

    backend = json.loads((DEPLOY / "lemonade" / "pard-onnx.json").read_text())
    paths = {path for path, *_ in ROUTES}
    assert {backend["health_probe"]["endpoint"], *backend["endpoints"].values()} <= paths | {"/v1/responses"}


def test_the_example_model_uses_the_backend() -> None:
    backend = json.loads((DEPLOY / "lemonade" / "pard-onnx.json").read_text())
    (model,) = json.loads((DEPLOY / "lemonade" / "user_models.json").read_text()).values()
    assert model["recipe"] == backend["recipe"]
    used = "".join(backend["platforms"]["cpu"]["args"])
    assert all(name == "main" or f"checkpoint:{name}" in used for name in model["checkpoints"])
