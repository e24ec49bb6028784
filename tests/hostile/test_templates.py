# ruff: noqa: E501 templates stand in one line
"""Chat templates of strangers: whatever they compute, they end with one line within seconds, in little memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from jinja2 import UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pard_onnx.models import demo
from pard_onnx.models.chat_template import to_json
from pard_onnx.models.errors import BadInput
from pard_onnx.models.template_budget import UNITS, TooMuchWork, limited
from pard_onnx.runtime.text.template import render
from pard_onnx.runtime.text.tokenizer import Text

SLOWEST = 6.0  # seconds on a loaded machine; about one on an idle one
HOSTILE = {
    # Loops
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that compute": "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a * b + 1 %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(9) %}" + "x" * 900 + "{% endfor %}{% endfor %}",
    "long bodies": "{% for a in range(99999) %}" + "{% set b = a ~ a %}" * 2000 + "{% endfor %}",
    "long conditions": "{% for a in range(99999) %}{% if " + "a < 100000 or " * 50 + "a" + " %}{% endif %}{% endfor %}",
    "loops with filters": "{% for a in range(9999) if range(99999)|list|length %}{% endfor %}",
    "loops that break": "{% for a in range(99999) %}{% for b in range(99999) %}{% if b > 9998 %}{% break %}{% endif %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in [[[]]] recursive %}{{ loop([a, a, a]) }}{% endfor %}",
    "a wide recursive loop": "{% for a in range(9) recursive %}{% if loop.depth < 12 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    "lengths of lazy lists": "{% for a in range(9999)|map('string') %}{% for b in range(9999)|map('string') %}{{ loop.length }}{% endfor %}{% endfor %}",
    # Texts
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a product of variables": "{% set n = 10 ** 10 %}{% set x = 'a' * n %}",
    "a reversed product": "{{ 10 ** 10 * 'ü' }}",
    "a product of lists": "{% set x = [0] * 10 ** 10 %}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by adding": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled lists": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled blocks": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
    "doubled by replacing": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x|replace('a', 'aa') %}{% endfor %}",
    "doubled by a method": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "doubled by joining": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.join(['', '', '']) %}{% endfor %}",
    "doubled by a filter": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = ['', '', '']|join(n.x) %}{% endfor %}",
    "doubled by a format": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "doubled by format": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "doubled by translating": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.translate({97: 'aa'}) %}{% endfor %}",
    "a huge join": "{{ range(99999)|join('x' * 99999) }}",
    "a huge join of a method": "{{ ('x' * 99999).join(range(99999)|map('string')) }}",
    "a huge join of a list": "{{ (['x' * 99999] * 99999)|join }}",
    "a width": "{{ 'a'.ljust(10 ** 10) }}",
    "a width of zeros": "{{ 'a'.zfill(10 ** 10) }}",
    "a width in a format": "{{ '%10000000000d' % 1 }}",
    "a width of a format": "{{ '%*d' % (10 ** 10, 1) }}",
    "a width for format": "{{ '{:10000000000}'.format(1) }}",
    "a nested width": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "a nested width as text": "{{ '{:{}}'.format(1, '10000000000') }}",
    "a width by keyword": "{{ '{a:{b}}'.format(a=1, b=10 ** 10) }}",
    "a width of a mapping": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10 ** 10}) }}",
    "the filter format": "{{ '%10000000000d'|format(1) }}",
    "the filter center": "{{ 'a'|center(10 ** 10) }}",
    "the filter indent": "{{ 'a\\nb'|indent(10 ** 10) }}",
    "the filter indent of texts": "{{ ('a\\n' * 9999)|indent('x' * 99999) }}",
    "the filter batch": "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "the filter slice": "{{ [1]|slice(10 ** 10)|list }}",
    "the filter map": "{{ [[1]]|map('batch', 10 ** 10, 'x')|map('list')|list }}",
    "the filter tojson": "{{ [[[1]]]|tojson(indent=10 ** 10) }}",
    "the filter tojson by position": "{{ [[[1]]]|tojson(false, 10 ** 10) }}",
    "separators": "{{ range(99999)|list|tojson(separators=('x' * 99999, ':')) }}",
    "the filter wordwrap": "{{ ('a' * 99999)|wordwrap(1, true, 'x' * 99999) }}",
    "the filter round": "{{ 1|round(10 ** 10, 'ceil') }}",
    "the filter round of whole numbers": "{{ 5|round(-(10 ** 10)) }}",
    "the filter striptags": "{{ ('<!---->' * 999999)|striptags }}",
    "tabs": "{{ ('\\t' * 999).expandtabs(10 ** 9) }}",
    "bytes": "{{ 'a'.encode().center(10 ** 10) }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x % 7 }}",
    "a time": "{{ strftime_now('%1000000000Y') }}",
    "times": "{{ strftime_now('%c' * 9999999999) }}",
    "a long error": "{{ raise_exception('a' * 10 ** 10) }}",
    # Time in one operation
    "a search from the end": "{% set a = 'a' * 9999999 %}{{ a.rfind('b' + 'a' * 999999) }}{{ a.rsplit('b' + 'a' * 999999) }}",
    "stripping": "{{ ('a' * 9999999).strip('b' * 9999999 + 'a') }}",
    "slices": "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "searches": "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{% set b = 'b' in a %}{% endfor %}",
    "searches in lists": "{% set a = range(99999)|list %}{% for i in range(99999) %}{% set b = -1 in a %}{% endfor %}",
    "searches by a test": "{% set a = range(99999)|list %}{% for i in range(99999) %}{% set b = -1 is in a %}{% endfor %}",
    "comparisons": "{% set a = 'a' * 9999999 %}{% set b = a ~ 'b' %}{% set c = a ~ 'c' %}{% for i in range(99999) %}{% set d = b == c %}{% endfor %}",
    "counting": "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{% set b = a.count('b') %}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{% set b = range(99999)|sort %}{% endfor %}",
    "uppercase": "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{% set b = a|upper|lower|title %}{% endfor %}",
    "selecting": "{% for i in range(99999) %}{% set b = range(99999)|select('odd')|list %}{% endfor %}",
    # Macros and blocks
    "a recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a doubly recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macros of macros": "{% macro a0() %}aaaaaaaaaa{% endmacro %}"
    + "".join(f"{{% macro a{i}() %}}{f'{{{{ a{i - 1}() }}}}' * 10}{{% endmacro %}}" for i in range(1, 12))
    + "{{ a11() }}",
    "recursive blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "callers": "{% macro m(n) %}{% if n %}{% call m(n - 1) %}{{ n }}{% endcall %}{% call m(n - 1) %}{{ n }}{% endcall %}{% endif %}{{ caller() }}{% endmacro %}{% call m(60) %}{% endcall %}",
    # Values that hold one another
    "lists of lists": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "lists of lists as JSON": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = [n.x] * 2 %}{% endfor %}{{ n.x|tojson }}",
    "tuples as keys": "{% set n = namespace(x=(0,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{% set d = {n.x: 1} %}",
    "compared lists": "{% set n = namespace(x=[0], y=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "objects of objects": "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "arguments of arguments": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ m(60, 1) }}",
}


REFUSED = (TooMuchWork, RecursionError)  # a recursion that only goes deep ends at Python's own limit
QUICK = 20  # budgets are that much smaller in the default run


def rendered(template: str, units: int = UNITS) -> str:
    with limited(units):
        return render(template, [{"role": "user", "content": "hi"}], {})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(REFUSED):
        rendered(HOSTILE[name], UNITS // QUICK)
    assert time.perf_counter() - start < SLOWEST


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not limit a process's memory by itself")
@pytest.mark.parametrize("name", HOSTILE)
def test_the_whole_budget_takes_seconds_and_little_memory(name: str) -> None:
    """In a process of its own: the memory that this one has taken says little."""
    program = (
        "import resource, runpy, sys\n"
        f"found = runpy.run_path({__file__!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        f"    found['rendered'](found['HOSTILE'][{name!r}])\n"
        "except found['REFUSED']:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert time.perf_counter() - start < 5 * SLOWEST
    assert int(done.stdout) < 500_000  # KB


def test_a_command_says_it_in_one_line() -> None:
    text = Text(demo.TARGET, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(BadInput) as raised:
        text.render([{"role": "user", "content": "hi"}])
    assert str(raised.value) == (
        "the chat template refuses these messages: it does more work than a chat template may; take another template, "
        "or give the prompt as text"
    )


NAMESPACES = (
    "{% set n = namespace(x=namespace()) %}{% for i in range(60) %}{% set m = namespace(a=n.x, b=n.x) %}{% set n.x = m %}"
    "{% endfor %}{{ n.x }}"
)


def test_namespaces_are_written_without_what_they_hold() -> None:
    assert rendered(NAMESPACES) == "<Namespace>"


HARMLESS = {
    "{{ messages|map(attribute='role')|list }}": "['user']",
    "{{ [1, [2, 3]]|tojson(indent=2) }}": "[\n  1,\n  [\n    2,\n    3\n  ]\n]",
    "{{ '%05.1f|%s' % (2.5, 'a') }}{{ '{:>4}'.format(7) }}{{ '%d'|format(3) }}": "002.5|a   73",
    "{{ 'ab'.center(6) }}|{{ 'ab'|center(6) }}|{{ 'a\nb'|indent(2) }}": "  ab  |  ab  |a\n  b",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}": "123",
    "{% for a in 'abc' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{{ a }} {% endfor %}": "13Falsea 23Falseb 33Truec ",
    "{% for a in range(9) if a is odd %}{{ loop.revindex }}{{ a }}{% else %}none{% endfor %}": "41332517",
    "{% for a in none or [] %}x{% else %}none{% endfor %}": "none",
    "{% for a in nothing %}x{% else %}none{% endfor %}": "none",
    "{% for a in range(9) %}{% if a > 1 %}{% break %}{% endif %}{{ a }}{{ loop.last }}{% endfor %}": "0False1False",
    "{% macro m(a, b=[1]) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, c=4) }}": "12(3,){'c': 4}",
    "{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a * 3 - 1 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}": "5338",
    "{{ 'a' ~ 1 ~ none ~ [2] }}{{ 'b' in 'abc' }}{{ 1 < 2 < 3 }}{{ 3 not in [1] }}": "a1None[2]TrueTrueTrue",
    "{{ 'a-b'.split('-')[1:] }}{{ 'abc'[::-1] }}{{ {'a': 1}['a'] }}{{ ' x '.strip() }}{{ 'aXa'.strip('a') }}": "['b']cba1xX",
    "{{ ['b', 'a']|sort|join(', ') }}{{ [3, 1]|max }}{{ [1, 2]|sum }}{{ 2.567|round(1) }}": "a, b332.6",
    "{{ 'x-y'|replace('-', '+') }}{{ 'x-y'.replace('-', '+') }}{{ '<a>'|e }}{{ ' a '|trim }}": "x+yx+y&lt;a&gt;a",
    "{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}": "[[1, 2], [3, 0]][[1, 2], [3]]",
    "{% call(x) m() %}{{ x }}{% endcall %}": None,
}


@pytest.mark.parametrize("template", HARMLESS)
def test_harmless_templates_write_what_they_wrote(template: str) -> None:
    """Each construct that pays does what it does in jinja's own sandbox."""
    wanted = HARMLESS[template]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.filters["tojson"] = to_json
    if wanted is None:
        with pytest.raises(UndefinedError):
            rendered(template)
        return
    assert (
        rendered(template) == plain.from_string(template).render(messages=[{"role": "user", "content": "hi"}]) == wanted
    )


def test_the_budget_is_counted_the_same_every_time() -> None:
    left = []
    for _ in range(3):
        with limited() as budget:
            render("{% for m in messages %}{{ m.content|upper }}{% endfor %}", [{"role": "user", "content": "hi"}], {})
            left.append(budget.left)
    assert len(set(left)) == 1 and left[0] < UNITS
