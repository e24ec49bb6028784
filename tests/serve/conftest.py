"""Fixtures of the page's tests: a scripted server, a browser, and a page that must not report an error.

PARD_ONNX_SERVE_URL is the address of a real server: the tests that script no replies then run against it.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stub_server
from stub_server import Stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    if os.environ.get("PARD_ONNX_SERVE_URL"):
        pytest.skip("this test scripts the server's replies")
    made = Stub()
    server = stub_server.start(made)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """Where the page is: at a real server's, or at the scripted one."""
    return os.environ.get("PARD_ONNX_SERVE_URL") or request.getfixturevalue("stub").url


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("PARD_ONNX_CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.skip("there is no chromium on the PATH, and PARD_ONNX_CHROMIUM names none")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


# What Chromium logs of each answer with an error's status; the page cannot prevent it.
UNAVOIDABLE = "Failed to load resource"


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; fails the test if the console shows an error, which violations of the policy are too."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(8000)
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if message.type in ("error", "warning") and UNAVOIDABLE not in message.text
            else None
        ),
    )
    made.goto(address)
    yield made
    context.close()
    assert not problems


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which PARD_ONNX_AXE names."""
    path = os.environ.get("PARD_ONNX_AXE")
    if not path:
        pytest.skip("PARD_ONNX_AXE names no axe.min.js")
    return Path(path).read_text("utf-8")


@pytest.fixture(scope="session")
def demo(demo_folder: Any) -> Any:
    """The shipped pair, as a model that a server can load."""
    from pard_onnx.serve.sources import named_source

    folders = demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")
    return named_source(*map(str, folders), "demo")


@pytest.fixture(scope="module")
def server(demo: Any) -> Iterator[Any]:
    """A server of the shipped pair with small limits."""
    pytest.importorskip("uvicorn")
    from served import served

    with served(demo, max_request_bytes=1 << 18, body_seconds=0.4, max_queue=8) as running:
        running.chat()  # the first request loads the model
        yield running
