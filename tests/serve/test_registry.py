"""Models by name: what a folder has, loading on demand, one at a time, unloading within the memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from served import MESSAGES, served

from pard_onnx.models.errors import Failure
from pard_onnx.models.library import Library, Record
from pard_onnx.models.manifest import Manifest
from pard_onnx.serve import registry as registry_module
from pard_onnx.serve.errors import ApiError
from pard_onnx.serve.registry import Registry
from pard_onnx.serve.settings import Settings
from pard_onnx.serve.sources import Source, named_source, required_bytes, sources_of


@pytest.fixture
def library(demo: Source, tmp_path: Path) -> Library:
    """Two targets and a draft, as a user puts them there."""
    folder = tmp_path / "models"
    folder.mkdir(mode=0o700)
    for name, model in (("one", demo.target), ("two", demo.target), ("draft", demo.drafts[0])):
        (folder / name).symlink_to(model)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "pard_onnx.json").write_text("{")
    return Library(folder)


class FakePair:
    """Counts the pairs that are open."""

    own_sampling = None
    opened: list[str]

    def __init__(self, opened: list[str], name: str) -> None:
        self.opened, self.name = opened, name
        opened.append(name)

    def info(self) -> Any:
        class Info:
            weight_bytes = 10

        return Info

    def close(self) -> None:
        self.opened.remove(self.name)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of fake models of 10 bytes that are open, each of which takes a moment to load."""
    names: list[str] = []
    loading = threading.Lock()

    def open_source(source: Source, settings: Settings) -> Any:
        assert loading.acquire(blocking=False), "two models are loaded at once"
        time.sleep(0.01)
        loading.release()
        if source.target == "bad":
            raise Failure("bad: cannot be loaded")
        return FakePair(names, source.name)

    monkeypatch.setattr(registry_module, "open_source", open_source)
    monkeypatch.setattr(registry_module, "required_bytes", lambda source, settings: 10)
    return names


SOURCES = tuple(Source(name, name) for name in ("a", "b", "c", "bad"))


def test_a_folder_has_its_targets_with_their_drafts(library: Library, demo: Source) -> None:
    found = {source.name: source for source in sources_of(library)}
    assert list(found) == ["one", "two"]
    assert all(Path(source.drafts[0]).name == "draft" for source in found.values())
    entry = library.require("one")
    (library.folder / "one").unlink()
    shutil.copytree(demo.target, library.folder / "one")
    entry.write_record(Record("somewhere/one", no_draft=True))
    assert sources_of(library)[0].drafts == ()
    entry.write_record(Record("somewhere/one", draft="gone"))
    assert sources_of(library)[0].drafts == ()
    entry.write_record(Record("somewhere/one", draft="draft"))
    assert Path(sources_of(library)[0].drafts[0]).name == "draft"


def test_models_of_a_folder_are_served(library: Library, demo: Source) -> None:
    with served(library=library, max_queue=3) as server:
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["one", "two"]
        assert not any(model["pard"]["loaded"] for model in server.get("/v1/models").json()["data"])
        texts = [server.chat(model=name).json() for name in ("two", "one", None)]
        assert [text["model"] for text in texts] == ["two", "one", "one"]  # without a name, the one used last
        assert len({json.dumps(text["choices"]) for text in texts}) == 1
        assert server.service.registry.open[0].pair.draft_name is not None
        (library.folder / "three").symlink_to(demo.target)
        assert server.chat(model="three").status_code == 200
        assert server.chat(model="four").json()["error"]["code"] == "model_not_found"
        manifest = Manifest.read(Path(demo.target))
        assert server.chat(model=manifest.source.model).status_code == 200
        assert server.get("/v1/models/three").json()["pard"]["loaded"]


def test_a_draft_that_does_not_fit_is_left_out(
    library: Library, write_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    (library.folder / "draft").unlink()
    draft = write_artifact(tmp_path / "other", "draft", rows=284)
    manifest = Manifest.read(Path(library.folder / "one"))
    other = Manifest.read(draft)
    replace(other, spec=replace(other.spec, family=manifest.spec.family)).write(draft)
    (library.folder / "draft").symlink_to(draft)
    assert len(sources_of(library)[0].drafts) == 1
    with served(library=library) as server:
        assert server.chat(model="one").status_code == 200
        assert server.service.registry.open[0].pair.draft_name is None
    with served(named_source(str(library.folder / "one"), str(draft))) as server:  # it was asked for
        answer = server.chat()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "model_not_loaded"


def test_requests_wait_for_a_model_that_is_loaded_once(opened: list[str]) -> None:
    async def run() -> None:
        registry = Registry(SOURCES, Settings())
        models = await asyncio.gather(*(registry.take("a") for _ in range(10)), registry.take("b"))
        assert len({id(model) for model in models}) == 2
        assert sorted(opened) == ["a", "b"]
        assert models[0].users == 10
        for model in models:
            model.release()
        await registry.close()
        assert opened == []

    asyncio.run(run())


def test_the_least_recently_used_model_leaves(opened: list[str]) -> None:
    async def run() -> None:
        registry = Registry(SOURCES, Settings(memory=25))
        for name in ("a", "b", "a"):
            (await registry.take(name)).release()
        (await registry.take("c")).release()
        assert sorted(opened) == ["a", "c"]
        await registry.close()

    asyncio.run(run())


def test_a_model_in_use_is_waited_for(opened: list[str]) -> None:
    async def run() -> None:
        registry = Registry(SOURCES, Settings(memory=10))
        used = await registry.take("a")
        other = asyncio.create_task(registry.take("b"))
        await asyncio.sleep(0.05)
        assert opened == ["a"]
        again = asyncio.create_task(registry.take("a"))  # does not go before the one that waits
        await asyncio.sleep(0.02)
        assert not again.done()
        used.release()
        (await other).release()
        assert opened == ["b"]
        (await again).release()
        assert opened == ["a"]
        await registry.close()

    asyncio.run(run())


def test_a_client_that_goes_away_does_not_stop_the_loading(opened: list[str]) -> None:
    async def run() -> None:
        registry = Registry(SOURCES, Settings())
        first, second = (asyncio.create_task(registry.take("a")) for _ in range(2))
        await asyncio.sleep(0.001)
        first.cancel()
        (await second).release()
        assert opened == ["a"]
        await registry.close()

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_tried_again(opened: list[str]) -> None:
    async def run() -> None:
        registry = Registry(SOURCES, Settings())
        for _ in range(2):
            with pytest.raises(Failure, match="cannot be loaded"):
                await registry.take("bad")
        (await registry.take("a")).release()
        with pytest.raises(ApiError, match="did you mean bad"):
            await registry.take("baad")
        await registry.close()

    asyncio.run(run())


def test_a_model_that_is_too_large_for_the_memory(opened: list[str]) -> None:
    async def run() -> None:
        with pytest.raises(Failure, match="--memory"):
            await Registry(SOURCES, Settings(memory=9)).take("a")

    asyncio.run(run())


def test_without_a_bound_it_is_a_share_of_the_machines(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def left(memory: int | None) -> list[str]:
        monkeypatch.setattr(registry_module, "memory_limit", lambda: memory)
        registry = Registry(SOURCES, Settings())
        for name in "abc":
            (await registry.take(name)).release()
        found = sorted(opened)
        await registry.close()
        return found

    assert asyncio.run(left(None)) == ["a", "b", "c"]
    assert asyncio.run(left(38)) == ["a", "b", "c"]  # 4/5 of it are 30.4
    assert asyncio.run(left(37)) == ["b", "c"]
    assert asyncio.run(left(5)) == ["c"]  # each of them takes more: one at a time


def test_a_draft_that_cannot_be_read_takes_no_memory(demo: Source, tmp_path: Path) -> None:
    (tmp_path / "pard_onnx.json").write_text("{")
    alone = required_bytes(replace(demo, drafts=()), Settings())
    assert required_bytes(replace(demo, drafts=(str(tmp_path),)), Settings()) == alone > 0


def test_the_memory_of_a_model(demo: Source) -> None:
    settings = Settings(memory=1, max_live=3, cache_bytes=1000)
    manifests = [Manifest.read(Path(folder)) for folder in (demo.target, *demo.drafts)]
    with served(demo, max_live=3, cache_bytes=1000) as server:
        server.chat(messages=MESSAGES)
        pair = server.pair
        expected = sum(one.weight_bytes for one in manifests) + 3 * pair.sequence_bytes + 1000
        assert required_bytes(demo, settings) == expected
