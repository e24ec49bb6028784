"""What llguidance says of a grammar, in one line that names the keyword and the fix."""

from __future__ import annotations

import re

# Lines that show the place in the grammar: "   1 | start: /[/", "     ^^^"
ECHO = re.compile(r"\s*(\d+ \||\^+\s*$)")
REGEX_ERROR = re.compile(r"regex parse error:\s*\n\s*(?P<pattern>[^\n]*)\n.*?error: (?P<reason>[^\n]*)", re.DOTALL)
# What llguidance says, and what is said instead
PHRASES = (
    (r'Unimplemented keys: \["(.*)"\]', r'the keyword "\1" is not supported; leave it out'),
    (r"oneOf constraints are not supported.*", r'"oneOf" with overlapping schemas is not supported; write "anyOf"'),
    (r"Unsatisfiable schema: schema is false", r"no text satisfies the schema false; leave it out"),
    (
        r"Unsatisfiable schema: anyOf is empty",
        r'no text satisfies an "enum" or "anyOf" without values; give at least one',
    ),
    (
        r"Unsatisfiable schema: incompatible types",
        r'no text satisfies it: "type" excludes all values that "allOf", "enum" or "const" leave',
    ),
    (r"Unsatisfiable schema: (.*)", r"no text satisfies it: \1"),
    (r"Unknown format: (.*)", r'"format": \1 is not known; leave it out, or give a "pattern"'),
    (r"Invalid type: (.*)", r'"type": \1 is no type of JSON'),
    (r"Pointer '(.*)' does not exist", r'"$ref": #\1 does not exist'),
    (
        r"Resource '(.*)' is not present in a registry.*",
        r'"$ref": \1 is not part of the schema; only its own parts can be named',
    ),
    (
        r"patternProperty regexes (.*) are not disjoint",
        r'"patternProperties": \1 may match the same name; write expressions that cannot',
    ),
    (r"(Value for 'multipleOf'.*)", r"\1; take another number"),
    (r"Failed to generate regex for (integer|float) range: (.*)", r'"minimum" or "maximum" is too large: \2'),
    (r"NoExtension.*", r"no text satisfies it: it has no end"),
    (r"(recursion limit exceeded|lark grammar too deeply nested).*", r"it is nested too deeply"),
    (
        r"(schema too large|compiling it takes .*|.*fuel exhausted.*|.*too big.*|.*[Tt]oo complex.*)",
        r"it is too complex (\1); make it simpler",
    ),
)


def explained(problem: str, kind: str) -> str:
    """The problem in one line; kind: of the grammar."""
    if found := REGEX_ERROR.search(problem):
        where = '"pattern" or "patternProperties": ' if kind == "json" else ""
        return f"{where}{found['pattern'].strip()} is no regular expression that can be followed: {found['reason']}"
    lines = [line for line in problem.splitlines() if not ECHO.match(line) and "<non-verbose/>" not in line]
    text = " ".join(" ".join(lines).split())
    for pattern, phrase in PHRASES:
        if found := re.search(pattern, text):
            return found.expand(phrase)
    return text
