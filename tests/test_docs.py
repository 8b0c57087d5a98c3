"""The documentation: every block of Python runs, every command parses, every page and link is there."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import yaml

from mfac.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITHOUT_CODE = {
    "accuracy.md", "api.md", "defaults.md", "how-it-works.md", "install.md", "recipes-reference.md", "speed.md",
    "works-with.md",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page, language):
    return [code for kind, code in BLOCK.findall((DOCS / page).read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES)
def test_python(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another."""
    code = blocks(page, "python")
    assert bool(code) == (page not in WITHOUT_CODE)
    for package in ("lightning", "transformers"):
        if package in page:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(code):
            exec(compile(block, f"{page}, block {number}", "exec"), names)


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
