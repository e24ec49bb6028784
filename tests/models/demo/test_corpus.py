"""The corpus: what is in it, what is held out, and in which order."""

import sys

import pytest

from pard_onnx.models.demo.corpus import END_OF_TEXT, HELD_OUT, Module, chat, documents, functions, modules

SOURCE = '''\
"""A module."""


def short():
    """Only a docstring."""


def bare(x):
    y = x
    return y


def add(a, b):
    """The sum.

    Of two.
    """
    total = a + b

    return total


class Thing:
    async def wait(self, *, seconds=1):
        """Wait."""
        await sleep(seconds)
'''


@pytest.fixture
def library(tmp_path):
    files = {
        "b.py": "b = 1\n",
        "Z.py": "z = 1\n",
        "a.py": "a = 1\r\n",
        "a/inner.py": "inner = 1\n",
        "json/decoder.py": "held = 1\n",
        "bisect.py": "held = 1\n",
        "tools/bisect.py": "not_held = 1\n",
        "site-packages/numpy.py": "no = 1\n",
        "unittest/test/test_it.py": "no = 1\n",
        "encodings/cp437.py": "no = 1\n",
        "test.py": "yes = 1\n",
        "_sysconfigdata__linux.py": "no = 1\n",
        "notes.txt": "no\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_modules_come_in_the_order_of_their_parts(library):
    names = [module.name for module in modules(library)]
    assert names == ["Z", "a.inner", "a", "b", "bisect", "json.decoder", "test", "tools.bisect"]


def test_held_out_modules_are_those_below_a_held_out_name(library):
    assert [module.name for module in modules(library) if module.held_out] == ["bisect", "json.decoder"]


def test_line_ends_are_one_character_and_stray_bytes_are_left_out(library):
    (library / "b.py").write_bytes(b"# caf\xe9\r\nb = 1\n")
    sources = {module.name: module.source for module in modules(library)}
    assert sources["a"] == "a = 1\n"
    assert sources["b"] == "# caf\nb = 1\n"


def test_functions_are_split_behind_the_docstring():
    add = 'def add(a, b):\n    """The sum.\n\n    Of two.\n    """'
    wait = '    async def wait(self, *, seconds=1):\n        """Wait."""'
    assert list(functions(Module("m", SOURCE))) == [
        (add, "    total = a + b\n\n    return total"),
        (wait, "        await sleep(seconds)"),
    ]


@pytest.mark.parametrize("source", ["def broken(:\n", "null = '\0'\n"], ids=["syntax", "null byte"])
def test_what_python_cannot_read_is_text_without_functions(source):
    assert list(documents(Module("bad", source))) == [f"# bad\n{source}{END_OF_TEXT}"]


def test_documents_are_the_text_and_a_turn_for_each_function():
    text, add, wait = documents(Module("pkg.mod", SOURCE))
    assert text == f"# pkg.mod\n{SOURCE}<|endoftext|>"
    assert add == (
        '<|im_start|>user\nComplete the code.\ndef add(a, b):\n    """The sum.\n\n    Of two.\n    """\n<|im_end|>\n'
        "<|im_start|>assistant\n    total = a + b\n\n    return total\n<|im_end|>\n<|endoftext|>"
    )
    assert wait.endswith("        await sleep(seconds)\n<|im_end|>\n<|endoftext|>")


def test_a_turn_is_what_the_chat_template_writes():
    import jinja2

    from pard_onnx.models.demo.tokenizer import CHAT_TEMPLATE

    messages = [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Ho"}]
    assert jinja2.Template(CHAT_TEMPLATE, keep_trailing_newline=True).render(messages=messages) == chat("Hi\nyou", "Ho")


def test_the_running_pythons_own_library_is_the_default():
    found = list(modules())
    names = [module.name for module in found]
    assert len(set(names)) == len(names) > 300
    assert {"argparse", "json.decoder", "bisect"} <= set(names)
    missing = {name for name in HELD_OUT if not any(n.split(".")[0] == name for n in names)}
    assert not missing, f"not in Python {sys.version}"
    assert not {n.split(".")[0] for n in names} & {"test", "site-packages", "pytest", "numpy"}
