"""Checks of what users give, and the other helpers that several folders share."""

from pathlib import Path

import numpy as np
import pytest

from pard_onnx.models.checks import (
    common_prefix,
    finite_number,
    nearest_name,
    path_text,
    require_whole,
    shown,
    true_or_false,
    whole_number,
)
from pard_onnx.models.errors import BadInput


def test_whole_numbers_of_python_and_numpy_are_taken():
    require_whole("n", np.int64(3), 3, 3)
    assert whole_number("n", np.int64(-4)) == -4


@pytest.mark.parametrize("value", [1.0, "1", None])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(BadInput, match=f"n must be a whole number, not {value!r}"):
        require_whole("n", value, 0)
    with pytest.raises(BadInput, match=f"n must be a whole number, not {value!r}"):
        whole_number("n", value)


def test_limits_are_named():
    with pytest.raises(BadInput, match="n must be from 1 to 3, not 4"):
        require_whole("n", 4, 1, 3)
    with pytest.raises(BadInput, match="n must be at least 1, not 0"):
        require_whole("n", 0, 1)
    with pytest.raises(BadInput, match="n must be a whole number, not True"):
        whole_number("n", True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e31, 10**400])
def test_numbers_without_effect_are_refused(value):
    with pytest.raises(BadInput, match=r"n must be a finite number of at most 1e\+30"):
        finite_number("n", value)


def test_finite_numbers_become_floats():
    assert finite_number("n", np.float32(0.5)) == 0.5
    assert isinstance(finite_number("n", 2), float)
    with pytest.raises(BadInput, match="n must be a number, not False"):
        finite_number("n", False)


@pytest.mark.parametrize("value", [True, np.True_])
def test_bools_of_python_and_numpy_are_taken(value):
    assert true_or_false("b", value) is True


@pytest.mark.parametrize("value", ["no", 1, 0, None, np.array([True]), 1.0])
def test_what_is_merely_true_is_no_bool(value):
    with pytest.raises(BadInput, match="b must be True or False, not "):
        true_or_false("b", value)


def test_paths_are_text():
    assert path_text("p", Path("a") / "b") == str(Path("a") / "b")
    for value in (5, b"a", None, ["a"]):
        with pytest.raises(BadInput, match=r"p must be a path, as text or os\.PathLike, not "):
            path_text("p", value)
    with pytest.raises(BadInput, match="null character"):
        path_text("p", "a\0b")


def test_values_are_shown_short_and_always():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert shown(3) == "3"
    assert len(shown("x" * 1000)) <= 120
    assert shown(10**5000) == "<int>"
    assert shown(Broken()).startswith("<Broken")


def test_the_nearest_name_ignores_case():
    assert nearest_name("llama-3.2-1b", ["Qwen2.5-7B", "Llama-3.2-1B"]) == "Llama-3.2-1B"
    assert nearest_name("xyz", ["webgpu", "cuda"]) is None
    assert nearest_name("xyz", ["webgpu", "cuda"], least_similarity=0) in ("webgpu", "cuda")
    assert nearest_name("xyz", [], least_similarity=0) is None


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
