"""The documentation: every block of Python runs, every command parses, every page and link is there."""

import gc
import re
import shlex
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from mfac.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITHOUT_CODE = {
    "accuracy.md", "api.md", "defaults.md", "how-it-works.md", "install.md", "recipes-reference.md", "speed.md",
    "works-with.md", "guides/where-zeros-pay.md",
}  # fmt: skip

NEEDED = {"lightning": "lightning", "transformers": "transformers", "onnxruntime": "guides/export"}  # package -> page

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page, language):
    return [code for kind, code in BLOCK.findall((DOCS / page).read_text()) if kind == language]


@contextmanager
def no_user_warning():
    """No warning for users, not even when the objects inside end; `names` are those of the code."""
    names = {"__name__": "page"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield names
        names.clear()
        gc.collect()
    assert [str(warning.message) for warning in seen if warning.category is UserWarning] == []


@pytest.mark.parametrize("page", PAGES)
def test_python(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another; they warn of nothing."""
    code = blocks(page, "python")
    assert bool(code) == (page not in WITHOUT_CODE)
    for package, named in NEEDED.items():
        if named in page:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with no_user_warning() as names:
        for number, block in enumerate(code):
            exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_readme():
    """Its block with a model and a loader in the place of the reader's own, and training up to the last update."""
    (code,) = blocks("../README.md", "python")
    assert "model, loader = ..., ..." in code
    with no_user_warning() as names:
        names["model"] = torch.nn.Linear(20, 3)
        names["loader"] = [(torch.randn(8, 20), torch.randint(3, (8,))) for _ in range(300)]
        exec(code.replace("model, loader = ..., ...", ""), names)
        names["pruner"].step(1000)
        assert round(names["pruner"].sparsity, 2) == 0.95


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_commands(page):
    text = (DOCS / page).read_text()
    lines = [line for code in blocks(page, "bash") for line in code.splitlines()]
    lines += [line.strip() for line in re.findall(r"^    (?:mfac .*)$", text, re.MULTILINE)]
    for line in lines:
        words = shlex.split(line, comments=True) if not line.endswith("\\") else []
        if words[:1] == ["mfac"]:
            app.parse_args(words[1:], exit_on_error=False)


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", (DOCS / page).read_text()):
        assert ((DOCS / page).parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(part)

    settings = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())
    assert sorted(pages(settings["nav"])) == PAGES
