"""The tools that a generation may call: what users give, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pard_onnx.models.errors import BadInput, shown

from .call_syntax import NAME
from .functions import function_tool
from .template import require_finite
from .tool_formats import INTERPRETERS

Tool = Mapping[str, Any]
ToolChoice = str | Mapping[str, Any]
MODES = NONE, AUTO, REQUIRED = "none", "auto", "required"
WANTED = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def checked_tools(tools: object) -> tuple[dict[str, Any], ...]:
    """The user's tools in OpenAI's form, in which Python functions are described; BadInput for what is no tool."""
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise BadInput(f"tools are a list of functions or of JSON objects {WANTED}, not {shown(tools)}")
    out = tuple(checked_tool(tool) for tool in tools)
    names = [tool_name(tool) for tool in out]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"two tools have the name {shown(twice)}; give each a name of its own")
    return out


def nested(value: object) -> object:
    """A tool, or the choice of one, of OpenAI's Responses API in the form of its chat completions."""
    if not isinstance(value, Mapping) or value.get("type") != "function" or "name" not in value or "function" in value:
        return value
    return {"type": "function", "function": {key: one for key, one in value.items() if key != "type"}}


def checked_tool(tool: object) -> dict[str, Any]:
    if callable(tool) and not isinstance(tool, Mapping):
        return function_tool(tool)
    tool = nested(tool)
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping):
        raise BadInput(f"tools: a tool is a Python function or a JSON object {WANTED}, not {shown(tool)}")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadInput(f"tools: the name of a tool is letters, digits, _ and -, not {shown(name)}")
    properties = parameters.get("properties", {}) if isinstance(parameters, Mapping) else {}
    if not isinstance(parameters, Mapping | None) or not isinstance(properties, Mapping):
        raise BadInput(f"the parameters of the tool {name} are a JSON schema of an object, not {shown(parameters)}")
    require_finite(tool, f"the tool {name}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(tool), allow_nan=False, default=plain))
    except (TypeError, ValueError) as error:
        raise BadInput(f"the tool {name} is not JSON: {error}") from error
    return copy


def plain(value: object) -> object:
    """A mapping of another type as a dict, for JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{shown(value)} has no JSON form")


def tool_name(tool: Tool) -> str:
    name: str = tool["function"]["name"]
    return name


def schema_parameters(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, an object."""
    parameters = tool["function"].get("parameters")
    return {"type": "object", **parameters} if parameters else NO_PARAMETERS


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a generation."""

    tools: tuple[dict[str, Any], ...]  # that the model is told of
    forced: tuple[dict[str, Any], ...] = ()  # one of these must be called; empty: the model may call any, or none
    several: bool = True  # whether more than one call may be made

    @classmethod
    def of(cls, tools: Sequence[dict[str, Any]], choice: object, parallel: bool) -> ToolUse | None:
        """See `Options`; None where no tool may be called. BadInput for a choice that is none of these tools."""
        wanted = checked_choice(choice)
        if not tools:
            if wanted not in (AUTO, NONE):
                raise BadInput(f"tool_choice is {shown(choice)}, but there are no tools; give tools=[...]")
            return None
        if not isinstance(wanted, Chosen):
            return None if wanted == NONE else cls(tuple(tools), tuple(tools) if wanted == REQUIRED else (), parallel)
        known, names = dict.fromkeys(map(tool_name, tools)), frozenset(wanted.names)
        unknown = next((name for name in wanted.names if name not in known), None)
        if unknown is not None:
            raise BadInput(f"tool_choice names {shown(unknown)}, which is not one of the tools: {', '.join(known)}")
        chosen = tuple(tool for tool in tools if tool_name(tool) in names)
        # Where a call must be made, a grammar keeps the other tools out; else the model must not know of them
        return cls(tuple(tools), chosen, parallel and not wanted.one) if wanted.must else cls(chosen, (), parallel)

    def parameters(self, arguments: Mapping[str, object]) -> dict[str, Sequence[str]]:
        """The parameters of each tool that may be called, by name; those of tools that are given to the template alone,
        in `arguments`, as SmolLM3's and Llama's templates read them, included."""
        out: dict[str, Sequence[str]] = {}
        for listed in (arguments.get("python_tools"), arguments.get("xml_tools"), self.tools):
            for tool in listed if isinstance(listed, list | tuple) else ():
                described = tool.get("function", tool) if isinstance(tool, Mapping) else {}
                parameters = described.get("parameters")
                properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
                if isinstance(described.get("name"), str):
                    out[described["name"]] = tuple(properties) if isinstance(properties, Mapping) else ()
        builtin = arguments.get("builtin_tools")
        for name in builtin if isinstance(builtin, list | tuple) else ():
            if isinstance(name, str):
                out.setdefault(name, ("code",) if name in INTERPRETERS else ("query",))
        return out


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice of some of the tools."""

    names: tuple[str, ...]
    must: bool = True  # whether one of them must be called
    one: bool = True  # whether there is only one call


def checked_choice(choice: object) -> str | Chosen:
    """The user's tool_choice; BadInput for anything else than a mode or tools.

    OpenAI's two APIs write the name of a tool, and allowed tools, in objects of different depth. An object whose type
    is a mode is that mode.
    """
    if choice is None:
        return AUTO
    if isinstance(choice, str) and choice:
        return choice if choice in MODES else Chosen((choice,))
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if isinstance(choice, Mapping) and kind == "allowed_tools":
        return allowed_tools(choice.get("allowed_tools", choice))
    if isinstance(kind, str) and kind in MODES:
        return kind
    name = chosen_name(choice)
    if name is None:
        raise BadInput(
            "tool_choice must be 'auto', 'none', 'required', the name of a tool, "
            '{"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", "mode": ..., "tools": '
            f"[...]}}, not {shown(choice)}"
        )
    return Chosen((name,))


def chosen_name(choice: object) -> str | None:
    """The name of the function in an object that chooses it; None for anything else."""
    choice = nested(choice)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def allowed_tools(choice: object) -> Chosen:
    """OpenAI's allowed_tools: some of the tools, one of which may be called (mode auto) or must be (required)."""
    mode, tools = (choice.get("mode"), choice.get("tools")) if isinstance(choice, Mapping) else (None, None)
    if mode not in (AUTO, REQUIRED):
        raise BadInput(f"tool_choice: the mode of allowed_tools must be 'auto' or 'required', not {shown(mode)}")
    names = [chosen_name(tool) for tool in tools] if isinstance(tools, list | tuple) else []
    found = tuple(name for name in names if name is not None)
    if not found or len(found) < len(names):
        raise BadInput(
            'tool_choice: the tools of allowed_tools must be a list of objects such as {"type": "function", "name": '
            f"...}}, not {shown(tools)}"
        )
    return Chosen(found, must=mode == REQUIRED, one=False)
