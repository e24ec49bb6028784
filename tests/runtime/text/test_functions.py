"""Python functions as tools have the schemas of transformers' `get_json_schema`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.functions import function_tool


class Unit(Enum):
    CELSIUS = "c"
    KELVIN = "k"


class Level(Enum):
    LOW = 1
    HIGH = 2.5
    NONE = None


def plain(city: str) -> str:
    """The weather."""


def weather(city: str, days: int = 1, unit: Unit = Unit.CELSIUS) -> dict[str, float]:
    """
    The weather in a city,
    by day.

    Args:
        city: The city's name: as locals write it.
            With country: "Ulm, DE".
        days: How many
            days (choices: [1, 3, 7])

        unit (not a name): still of days
        unit: The unit

    Returns:
        The temperatures: one a day.

    Raises:
        ValueError: never
    """


def nothing() -> None:
    """Does nothing."""


def many(
    a: int | None,
    b: Optional[float],  # noqa: UP045 as users write it
    c: Union[str, int],  # noqa: UP007
    d: list[dict[str, int]] | None,
    e: tuple[int, str],
    f: dict[str, Any],
    g: Literal["x", "y", 3],
    h: Any,
    i: list,  # type: ignore[type-arg]
    j: bool | list[int] | None = None,
    k: Level = Level.LOW,
    l: dict = {},  # type: ignore[type-arg]  # noqa: B006, E741
    m: list[int] | tuple[int, int] = [],  # noqa: B006
    n: tuple = (),  # type: ignore[type-arg]
) -> Callable[..., Any]:
    """All kinds (choices: none).

    Args:
        a: A
        b: B (choices: ["tea ", "coffee"])
        c: C
          d: deeper than c, so of c
        d: D
        e: E
        f: F
        g: G
        h:
            H on a line of its own
        i: I
        j: J

        k: K
        l: L
        m: M
        n: N
    Returns: not on a line of its own
    """


class Holder:
    def method(self, x: float) -> None:
        """Of a class.

        Args:
            x: The x
        """


@pytest.mark.parametrize("function", [weather, nothing, many, Holder().method, Holder.method])
def test_schemas_are_those_of_transformers(function: Callable[..., Any]) -> None:
    assert function_tool(function) == get_json_schema(function)


def test_a_return_type_without_json_form_is_left_out() -> None:
    assert "return" not in function_tool(many)["function"]


HINTS = st.recursive(
    st.sampled_from([int, float, str, bool, Any, list, dict, tuple, Unit, Level, Literal["a", 2], Literal[None, True]]),
    lambda inner: st.one_of(
        inner.map(lambda hint: list[hint]),  # type: ignore[valid-type]
        inner.map(lambda hint: dict[str, hint]),  # type: ignore[valid-type]
        inner.map(lambda hint: Optional[hint]),  # type: ignore[arg-type] # noqa: UP045
        st.tuples(inner, inner).map(lambda both: Union[both]),  # type: ignore[arg-type] # noqa: UP007
        st.tuples(inner, inner).map(lambda both: tuple[both]),  # type: ignore[valid-type]
    ),
    max_leaves=6,
)
WORDS = st.text("ab (:)[]\n\t\"',.", max_size=25).map(str.strip)


@settings(max_examples=150)
@given(hint=HINTS, default=st.booleans(), about=WORDS, text=WORDS, tail=st.sampled_from(["", "\n\nReturns:\n  r"]))
def test_any_hint_and_docstring(hint: Any, default: bool, about: str, text: str, tail: str) -> None:
    def tool(value: Any) -> int: ...

    tool.__annotations__ = {"value": hint, "return": hint}
    tool.__defaults__ = (None,) if default else None
    tool.__doc__ = f"{about}\n\nArgs:\n    value: {text}{tail}"
    try:
        expected = get_json_schema(tool)
    except Exception:  # what transformers cannot read, this package refuses or reads
        try:
            function_tool(tool)
        except BadInput as error:
            assert "\n" not in str(error)
        return
    assert function_tool(tool) == expected


class Custom: ...


def undocumented(x: int) -> None: ...


def unhinted(x) -> None:  # type: ignore[no-untyped-def]
    """No hint.

    Args:
        x: X
    """


def custom(x: Custom) -> None:
    """A class.

    Args:
        x: X
    """


def endless(x: tuple[int, ...]) -> None:
    """A tuple.

    Args:
        x: X
    """


def choosy(x: int) -> None:
    """Choices.

    Args:
        x: X (choices: [1, )
    """


def unresolved(x: Missing) -> None:  # type: ignore[name-defined] # noqa: F821
    """A name that does not exist.

    Args:
        x: X
    """


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (plain, "plain does not describe its argument city"),
        (undocumented, "undocumented has no docstring"),
        (unhinted, "argument x of the tool unhinted has no type hint"),
        (custom, "type hint of x of the tool custom"),
        (endless, "use list for any number"),
        (choosy, "choices of x of the tool choosy are no JSON list"),
        (unresolved, "type hints of the tool unresolved cannot be read"),
        (lambda: 5, "a function with a name"),
    ],
)
def test_functions_that_are_no_tools(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(BadInput, match=problem) as caught:
        function_tool(function)
    assert "\n" not in str(caught.value)
