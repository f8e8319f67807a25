"""The pages tell the truth: messages are the program's, pages are in the site, generated ones are whole."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import app
from pipeline.config import known_keys
from tests.conftest import ROOT, missing
from tests.deploy.pages import PAGES, WALK, shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_by_a_test_or_says_why_not(page: Path) -> None:
    """Without a mark it is run by `make release-check`, as typed."""
    for block in shown(page):
        if not block.mark:
            assert page.stem in (*WALK, "README"), block
            assert all(command.startswith("globallocal ") for command in block.commands), block
        else:
            assert block.mark in ("dry-run", "output") or len(block.mark.removeprefix("not run: ")) > 10, block


def words_of_the_program() -> str:
    """Every text in the code, one per line; what is filled in is left out."""
    found = []
    for folder in ("data_prep", "model", "pipeline", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_every_message_of_the_page_is_one_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) > 20
    said = words_of_the_program()
    parts = [part.strip(" ,") for message in messages for part in message.split("…")]
    assert [part for part in parts if part not in said] == []
    assert all(any(len(part) > 4 for part in message.split("…")) for message in messages)


def test_the_site_builds_and_asks_nothing_of_other_hosts(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("mkdocs")
    if not program.exists():
        missing("mkdocs", "pip install 'globallocal[docs]'")
    done = subprocess.run(
        [str(program), "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES[1:]} <= set(pages)
    fetched = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(https?:)?//", re.IGNORECASE)
    assert [name for name, text in pages.items() if fetched.search(text)] == []
    assert [key for key in known_keys() if f"<code>{key}</code>" not in pages["settings.html"]] == []
    commands = [item.name or item.callback.__name__ for item in app.registered_commands if item.callback]
    for name in [*commands, "config-show", "checkpoints-list"]:
        assert f'id="{name}"' in pages["commands.html"]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    (nav,) = [value for key, value in yaml.safe_load(text).items() if key == "nav"]
    named = {page for section in nav for pages in section.values() for item in pages for page in item.values()}
    assert named == {page.name for page in PAGES[1:]} | {"settings.md", "commands.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """Those to files of the project too, which the site does not have."""
    generated = {"settings.md", "commands.md"}
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists() and link not in generated] == []


def test_the_training_host_needs_none_of_it() -> None:
    from launch.about import requirements

    assert not [line for line in requirements() if "mkdocs" in line and "extra ==" not in line]
    assert shutil.which("mkdocs") is None or "mkdocs" not in (ROOT / "Dockerfile").read_text()
