"""The page of `globallocal serve` in a real browser: somebody types, watches, stops, and looks at tokens."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.launch.browser import Page, browser
from tests.launch.serving import Running, served


@pytest.fixture(scope="module")
def server(tiny_export: Path) -> Iterator[Running]:
    with served(tiny_export, "--max-new-tokens", "5000") as running:
        yield running


def test_nothing_of_the_page_lies_elsewhere(server: Running) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.text
    assert "connect-src 'self'" in answer.text
    assert " src=" not in answer.text
    assert "@import" not in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_name_in_an_address_stays_text(server: Running) -> None:
    answer = requests.get(server.address, headers={"Host": '"><script>alert(1)</script>'}, timeout=60)
    assert "<script>alert" not in answer.text


TEXT = "[...document.querySelectorAll('[role=option]')].map(e => e.textContent)"
SHOWN = "document.getElementById('panel').textContent"


async def writes(page: Page, server: Running) -> None:
    await page.open(server.address, 1200, 800)
    await page.type("#prompt", "The <b>history</b>")
    await page.ask("document.querySelector('details').open = true")
    await page.type("#max_tokens", "12")
    await page.type("#seed", "3")
    await page.click("#start")
    await page.until("document.getElementById('result').dataset.ended")
    body = {"prompt": "The <b>history</b>", "max_tokens": 12, "seed": 3, "routing": True, "logprobs": 6}
    (choice,) = server.post(body).json()["choices"]
    assert "".join(await page.ask(TEXT)) == choice["text"]
    assert await page.ask("document.getElementById('text').textContent") == "The <b>history</b>" + choice["text"]
    await page.click("[role=option]:nth-of-type(4)")  # the prompt stands in front
    shown = [item for item in choice["routing"] if item["text"]][2]
    panel = await page.ask(SHOWN)
    assert "token 3, probability" in panel
    assert [f"{gate:.2f}" in panel for gate in shown["gates"]] == [True, True]
    rows = [row for block in shown["rows"] for router in block for row, _ in router]
    assert [row for row in rows if f"{row} · " not in panel] == []
    await page.press("ArrowRight")
    assert "token 4, probability" in await page.ask(SHOWN)
    colours = "new Set([...document.querySelectorAll('[role=option]')].map(e => e.style.background)).size"
    assert await page.ask(colours) > 1
    await page.ask("document.getElementById('colour').value = 'none'")
    await page.ask("document.getElementById('colour').dispatchEvent(new Event('change'))")
    assert await page.ask(colours) == 1
    await page.click("#more")
    await page.until("document.getElementById('said').textContent.startsWith('all tokens')")
    assert (await page.ask("document.getElementById('prompt').value")) == "The <b>history</b>" + choice["text"]
    assert page.complaints == []


async def stops(page: Page, server: Running) -> None:
    await page.open(server.address, 390, 800, dark=True)
    await page.type("#prompt", "The")
    await page.ask("document.getElementById('max_tokens').value = 5000")
    await page.click("#start")
    await page.until("document.querySelectorAll('[role=option]').length > 2")
    await page.click("#stop")
    await page.until("document.getElementById('said').textContent.startsWith('stopped')")
    assert await page.ask("document.documentElement.scrollWidth") == 390
    await page.ask("document.getElementById('max_tokens').value = -1")
    await page.click("#start")
    await page.ask("document.getElementById('form').dispatchEvent(new Event('submit', {cancelable: true}))")
    await page.until("!document.getElementById('problem').hidden")
    assert "max_tokens: is -1" in await page.ask("document.getElementById('problem').textContent")


def test_a_person_writes_and_looks_at_tokens(server: Running, tmp_path: Path) -> None:
    async def visit() -> None:
        async with browser(tmp_path / "profile") as page:
            await writes(page, server)

    asyncio.run(visit())
    assert json.loads(server.get("/health").text)["decoding"] == 0


def test_a_person_stops_a_text_on_a_phone(server: Running, tmp_path: Path) -> None:
    async def visit() -> None:
        async with browser(tmp_path / "profile") as page:
            await stops(page, server)

    asyncio.run(visit())
    server.wait_for("decoding", 0)
