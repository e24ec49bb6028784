"""What chat templates are compiled in, as in transformers; templates that cannot be compiled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import PardWarning
from .template_budget import (
    MACRO,
    body,
    counted,
    counted_each,
    limited,
    operate,
    printed,
    require_short_format,
    scanned,
    searched,
    sliced,
    spend_on_made,
    text_units,
)
from .template_calls import OpaqueNamespace, counted_filters, counted_tests, spend_on_call

LONGEST = 1_000_000  # characters of a template; real ones have up to 20 thousand
# What stands before and after the body of each `{% generation %}` that is rendered; training looks for the bodies
GENERATION_MARKS = ContextVar("generation_marks", default=("", ""))
# Units of an expression or statement by its kind. Calls, filters and tests pay when they happen
NODE = 2
WEIGHTS: dict[type[nodes.Node], int] = {
    **dict.fromkeys((nodes.Add, nodes.Sub, nodes.Mul, nodes.FloorDiv, nodes.Mod, nodes.Pow), 30),
    **dict.fromkeys((nodes.Getattr, nodes.Getitem, nodes.Test), 15),
    **dict.fromkeys((nodes.Output, nodes.Compare, nodes.Concat, nodes.Assign), 10),
}


def warn_of_template(template: str | None, folder: Path) -> None:
    """Warn with PardWarning of a chat template that cannot be compiled, naming its file and line.

    folder: the tokenizer's, or a GGUF file. This is no error, as it is none in transformers when a model is loaded:
    only chats need the template.
    """
    problem = template_problem(template) if template else None
    if problem:
        named = (folder / name for name in ("chat_template.jinja", "tokenizer_config.json"))
        path = next((path for path in named if path.is_file()), folder)
        warnings.warn(
            f"{path}: the chat template is broken: {problem}; the exported model takes prompts, but no chats: correct "
            "the template and export again",
            PardWarning,
            stacklevel=3,
        )


def template_problem(template: str) -> str | None:
    """Why a template cannot be compiled, with its line; None if it can be. Takes seconds at most."""
    if len(template) > LONGEST:
        return f"it has {len(template)} characters, more than {LONGEST}"
    try:
        environment().compile(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {' '.join(str(error.message).split()).rstrip('.')}"
    except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        # What jinja makes of it is no Python: loops or expressions that are nested too deeply
        return f"it is too deeply nested ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def weight(node: nodes.Node) -> int:
    """Units of evaluating a node once, without the turns of loops in it."""
    if isinstance(node, nodes.TemplateData):
        return NODE + text_units(node.data)
    if isinstance(node, nodes.Macro):
        return NODE
    inner = [node.iter] if isinstance(node, nodes.For) else node.iter_child_nodes()
    return WEIGHTS.get(type(node), NODE) + sum(map(weight, inner))


Calls = dict[int, str]


def calls_of(tree: nodes.Template) -> Calls:
    """The calls that the values of nodes go through, by the nodes' ids: their beginnings. Adds what bodies cost."""
    out: Calls = {}

    def pass_to(call: str, *values: nodes.Node) -> None:
        for value in values:
            if isinstance(value, nodes.Const) and not call.startswith("body"):
                continue
            out[id(value)] = f"environment.{call}{out.get(id(value), '')}"

    def charge_body(node: Any, units: int) -> None:
        mark = nodes.Const(0, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(mark, lineno=node.lineno))
        pass_to(f"body({units}, ", mark)

    found = list(tree.find_all(nodes.Node))
    for node in found:  # literals are paid for whole, whatever else is done with them
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and is_made(node):
            pass_to("printed(", node)
    for node in found:
        match node:
            case nodes.For():
                turn = sum(map(weight, (*node.body, *([node.test] if node.test else ()))))
                ends_early = next(node.find_all(nodes.Break), None)
                pass_to(f"{'counted_each' if ends_early else 'counted'}({turn}, ", node.iter)
                if node.recursive:
                    charge_body(node, turn)
            case nodes.Macro() | nodes.CallBlock() | nodes.Block():
                charge_body(node, MACRO + sum(map(weight, node.body)))
            case nodes.Concat():
                pass_to("printed(", *node.nodes)
            case nodes.Compare():
                pass_to("scanned(", node.expr)
                for operand in node.ops:
                    pass_to("searched(" if operand.op in ("in", "notin") else "scanned(", operand.expr)
            case nodes.Getitem():
                if isinstance(node.arg, nodes.Slice):
                    pass_to("sliced(", node.node)
                elif not isinstance(node.arg, nodes.Const):
                    pass_to("scanned(", node.arg)
    return out


def is_made(node: nodes.Node) -> bool:
    """Whether a list, tuple or object is made of values that are not constants, and is not assigned to."""
    inner = node.find_all(nodes.Expr)
    return getattr(node, "ctx", "load") == "load" and any(not isinstance(one, nodes.Const) for one in inner)


class CountingGenerator(CodeGenerator):
    """Compiles templates that pay for their work, see `template_budget`.

    Evaluates no expression while it compiles: `{{ "a" * 10 ** 10 }}` would take all memory before it is rendered.
    """

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        self._calls = calls_of(node)
        super().visit_Template(node, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.get(id(node)) if isinstance(node, nodes.Expr) else None
        if not call:
            return super().visit(node, *args, **kwargs)
        self.write(call)
        super().visit(node, *args, **kwargs)
        self.write(")" * call.count("("))
        return None

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class BudgetedTemplate(Template):
    """A template whose rendering has a budget."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        with limited():
            return super().render(*args, **kwargs)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of templates, in which all that takes time or memory pays for it."""

    code_generator_class = CountingGenerator
    template_class = BudgetedTemplate
    intercepted_binops = frozenset(("+", "-", "*", "//", "%", "**"))
    # What compiled templates call by these names
    counted, counted_each, body = staticmethod(counted), staticmethod(counted_each), staticmethod(body)
    printed, scanned, searched, sliced = map(staticmethod, (printed, scanned, searched, sliced))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return operate(operator, left, right, self.binop_table[operator])

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        return spend_on_made(super().call(__context, __obj, *spend_on_call(__obj, args, kwargs), **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The method `format` of a text, which pays."""
        plain = super().wrap_str_format(value)
        if plain is None:
            return None

        def format_text(*args: Any, **kwargs: Any) -> str:
            require_short_format(value.__self__, [args, kwargs])
            return plain(*args, **kwargs)

        return format_text


class GenerationTag(Extension):
    """The tag `{% generation %}`, which marks the assistant's words for training: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables that are set in the body are not seen after it
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        before, after = GENERATION_MARKS.get()
        text: str = caller()
        return f"{before}{text}{after}"


@lru_cache(maxsize=1)
def environment() -> TemplateEnvironment:
    """What templates are compiled in, as in transformers (chat_template_utils.py)."""
    out = TemplateEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
        optimized=False,  # see `CountingGenerator`
        finalize=printed,
    )
    out.filters.update(counted_filters({"tojson": to_json}))
    out.tests.update(counted_tests())
    del out.globals["lipsum"]  # random text of any length
    out.globals |= {"namespace": OpaqueNamespace, "raise_exception": refuse, "strftime_now": time_now}
    return out


def time_now(pattern: str) -> str:
    """The function `strftime_now` of templates."""
    require_short_format(pattern, ())
    return datetime.now().strftime(pattern)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """The filter `tojson`. Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: str) -> NoReturn:
    """The function `raise_exception` of templates."""
    printed(message)
    raise TemplateError(message)
