"""A real browser for tests: Debian's Chromium, driven by playwright."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright

CHROMIUM = Path("/usr/bin/chromium")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="needs a browser: apt-get install -y chromium"
)

LONGEST_WAIT_MS = 15_000
"""Of everything that a test waits for in a page."""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser without a window."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


class Watched:
    """A page of its own context, and all that it should not have done.

    Attributes:
        page: the page.
        complaints: errors of scripts and breaches of the content security policy.
        addresses: of every request that it sent.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        page.set_default_timeout(LONGEST_WAIT_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("console", self._console)

    def _console(self, message) -> None:
        # The browser reports answers that are no success as well, which some tests want.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)


@asynccontextmanager
async def opened(browser: Browser, **options) -> AsyncIterator[Watched]:
    """A page as a first visitor has it; ``options`` are those of its context."""
    context = await browser.new_context(**options)
    watched = Watched(await context.new_page())
    await watched.page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective))"
    )
    yield watched
    await context.close()
