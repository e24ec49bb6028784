"""Speed that is lost is told, once a load: without kernels, in graphs for other devices, and after a fallback."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pard_onnx import PardWarning, load
from pard_onnx.doctor_command import main as doctor
from pard_onnx.models.extras import rebuild_command
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import FLOAT16, Recipe, recipe
from pard_onnx.runtime import kernels
from pard_onnx.runtime.providers.table import CPU, PROVIDERS
from pard_onnx.runtime.speed import Placed, slow_reasons, uses_kernels

needs_kernels = pytest.mark.skipif(kernels.isa() is None, reason="the kernels are not built, or not for this processor")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The kernels' library is looked for at this path, at which nothing is."""
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / kernels.LIBRARY.name)
    monkeypatch.setattr(kernels, "load", kernels.load.__wrapped__)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    yield tmp_path / kernels.LIBRARY.name


def told(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    assert all(one.category is PardWarning for one in found)
    assert all(one.filename == __file__ for one in found)
    return [str(one.message) for one in found]


@needs_kernels
def test_hidden_kernels_are_told_once(library: Path, pair_folders: tuple[Path, Path]) -> None:
    lines = told(lambda: load(*pair_folders, threads=1).close())
    assert len(lines) == 1
    assert lines[0].startswith(
        f"{pair_folders[0]} and {pair_folders[1]}: this package's CPU kernels were not built, so"
    )
    assert lines[0].endswith(rebuild_command())


def test_a_model_that_is_shared_was_told_by_the_pair_that_opened_it(
    library: Path, pair_folders: tuple[Path, Path]
) -> None:
    with pytest.warns(PardWarning, match="CPU kernels were not built"):
        lender = load(*pair_folders, threads=1)
    assert told(lambda: load(lender, lender).close()) == []
    lender.close()


def test_a_library_of_another_system_is_told(library: Path, pair_folders: tuple[Path, Path]) -> None:
    library.write_bytes(b"\x7fELF no")
    (line,) = told(lambda: load(pair_folders[0], threads=1).close())
    assert "cannot be loaded (" in line and "\n" not in line


@pytest.mark.parametrize("case", ["switched off", "another processor", "here"])
def test_what_is_meant_is_not_told(
    library: Path, pair_folders: tuple[Path, Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "switched off":
        monkeypatch.setenv(kernels.VARIABLE, kernels.OFF)
    elif case == "another processor":
        monkeypatch.setattr(kernels.platform, "machine", lambda: "riscv64")
    else:
        real = Path(kernels.__file__).with_name(library.name)
        if not real.exists():
            pytest.skip("the kernels are not built")
        shutil.copy(real, library)
    assert told(lambda: load(pair_folders[0], threads=1).close()) == []


def test_a_frozen_application_is_told_what_it_lacks(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.sys, "frozen", True, raising=False)
    assert "as the PyInstaller hook does" in str(kernels.problem())


def test_the_doctor_says_it_with_the_fix(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor([])
    assert (
        "this package's CPU kernels were not built, so ONNX Runtime's run, at about half the speed; install a C++"
        in (" ".join(capsys.readouterr().out.split()))
    )
    doctor(["--json"])
    assert '"slow": ["this package' in capsys.readouterr().out


def placed(folder: Path, provider: str = "cpu", reason: str = "", **changes: Any) -> Placed:
    return Placed("m", replace(Manifest.read(folder), **changes), PROVIDERS[provider], reason)


HALF = Recipe(FLOAT16, FLOAT16, FLOAT16)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"attention": "portable"}, "plain operators, .* export for the CPU with pard-export --device cpu$"),
        ({"recipe": HALF, "precision": "fp16"}, "float16, .* --device cpu --precision int4$"),
        ({"recipe": replace(recipe("int4"), activations="float16")}, "float16, .* --device cpu --io-dtype fp32$"),
    ],
)
def test_graphs_for_other_devices_are_told_on_the_cpu(
    pair_folders: tuple[Path, Path], changes: dict[str, Any], fix: str
) -> None:
    import re

    model = placed(pair_folders[0], **changes)
    (line,) = slow_reasons([model])
    assert re.search(fix, line) and line.startswith("m: ")
    (line,) = slow_reasons([model, replace(model, name="d")])
    assert line.startswith("m and d: ")
    assert slow_reasons([replace(model, provider=PROVIDERS["cuda"])]) == []


def test_a_fallback_is_told_with_its_reason(pair_folders: tuple[Path, Path]) -> None:
    (line,) = slow_reasons([placed(pair_folders[0], reason="fallback; provider 'cuda' is not here; pip install it")])
    assert line == "m: runs on cpu as a fallback; provider 'cuda' is not here; pip install it"
    assert slow_reasons([placed(pair_folders[0], reason="as asked for")]) == []


def test_which_models_the_kernels_have_work_in(pair_folders: tuple[Path, Path]) -> None:
    assert CPU.key == "cpu"
    expected = {
        ("fp32", "gqa"): True,
        ("fp32", "portable"): False,
        ("int4", "portable"): True,
        ("fp16", "gqa"): False,
        ("int8-a8w8", "portable"): False,
    }
    manifest = Manifest.read(pair_folders[0])
    for (precision, attention), wanted in expected.items():
        assert uses_kernels(replace(manifest, recipe=recipe(precision), attention=attention)) == wanted  # type: ignore[arg-type]
