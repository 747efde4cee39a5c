"""The README tells the truth: its examples run, its commands and links exist, its figures are in the results."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
# what talks to a server is run against one in tests/serve/test_server.py
EXAMPLES = [e for e in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "127.0.0.1" not in e]


def test_there_are_seven_examples():
    assert len(EXAMPLES) == 7


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    if "transformers" in EXAMPLES[number]:
        pytest.importorskip("transformers")
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "__main__"})


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / document).read_text()):
            if target != "what":
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_links_exist(document):
    path = ROOT / document
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{document} links {link}"


def test_figures_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    plot = importlib.import_module("benchmarks.plot")
    assert plot.readme_with_figures(TEXT) == TEXT
