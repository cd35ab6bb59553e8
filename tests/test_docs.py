"""What the pages say of the program and the library is complete, and their links lead somewhere."""

import doctest
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

import hvpspec
from hvpspec.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


COMMANDS = typer.main.get_command(app).commands


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_page_names_every_option(name: str) -> None:
    page = text("docs/cli.md")
    assert f"`hvpspec {name}`" in page
    options = {flag for p in COMMANDS[name].params for flag in p.opts if flag.startswith("--")}
    assert [flag for flag in sorted(options) if f"`{flag}" not in page] == []


def test_the_command_line_page_names_no_option_that_does_not_exist() -> None:
    exist = {flag for command in COMMANDS.values() for p in command.params for flag in p.opts}
    exist |= {"--version", "--debug", "--help"}
    assert set(re.findall(r"--[a-z][a-z0-9-]*", text("docs/cli.md"))) <= exist


def test_the_library_pages_name_every_public_name() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"\.\. auto\w+:: (\w+)", pages))
    names = {n for n in hvpspec.__all__ if not isinstance(getattr(hvpspec, n), ModuleType)}
    assert names - documented == set()


def rows() -> list[str]:
    """The lines of code in the tables of "Find your case"."""
    section = text("docs/own-network.md").split("## Find your case")[1].split("\n## ")[0]
    return re.findall(r"^\|.*\| `(HessianOperator\(.*\))` \|$", section, re.MULTILINE)


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What the page says that the names in the tables stand for."""
    page, found = text("docs/own-network.md"), {}
    (section,) = re.findall(r"## In Python.*?\n\| my model", page, re.DOTALL)
    for example in doctest.DocTestParser().get_examples(section):
        exec(example.source, found)
    return found


@pytest.mark.parametrize("row", rows())
def test_every_row_of_the_table_answers(row: str, names: dict[str, object]) -> None:
    H = eval(row, names)
    v = torch.ones(H.shape[0])
    assert bool(torch.isfinite(H @ v).all())
    assert hvpspec.index(H, tau=1e-3, method="exact").dim == H.shape[0]


def test_the_table_has_rows() -> None:
    assert len(rows()) == 26


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", text(page))
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"\nversion: {hvpspec.__version__}\n" in text("CITATION.cff")


def test_console_examples_name_commands_that_exist() -> None:
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md"]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    used = [line.removeprefix("$ hvpspec ") for line in lines if line.startswith("$ hvpspec ")]
    assert used
    for line in used:
        (name,) = (name for name in COMMANDS if f"{line} ".startswith(f"{name} "))
        options = {flag for p in COMMANDS[name].params for flag in p.opts}
        assert {word for word in line.split() if word.startswith("--")} <= options
