"""The dashboard in a real browser, served by the real admin port; the traffic is made up."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.system.browser import Watched, chromium, needs_chromium, opened
from tests.system.fakeadmin import LivePlane, serving

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]

expect.set_options(timeout=15_000)

STEP = {"min_duration_s": 3600}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
def plane(tmp_path) -> LivePlane:
    return LivePlane(tmp_path)


@pytest_asyncio.fixture(loop_scope="module")
async def url(plane) -> AsyncIterator[str]:
    async with serving(plane) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def watched(browser) -> AsyncIterator[Watched]:
    async with opened(browser) as watched:
        yield watched


@pytest.fixture
def page(watched) -> Page:
    return watched.page


async def start(plane: LivePlane, **changes) -> str:
    """A rollout in its first step; its id."""
    steps = [{"weight_bp": bp, **STEP} for bp in (500, 2500)]
    rollout = await plane.start_rollout(
        "digits", plane.spec(canary=4, steps=steps, **changes), "ci"
    )
    plane.tick(0.25)
    return rollout.id


NAME_OF_FOCUSED = """(() => {
    const at = document.activeElement;
    return (at.labels?.length ? at.labels[0].firstChild : at).textContent;
})()"""


async def tab_to(page: Page, name: str) -> None:
    """Move focus with the Tab key alone, as far as to a button, link or field of this name."""
    for _ in range(60):
        await page.keyboard.press("Tab")
        if (await page.evaluate(NAME_OF_FOCUSED)).strip() == name:
            return
    raise AssertionError(f"Tab does not come to {name!r}")


async def width_beyond(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return await page.evaluate("document.documentElement.scrollWidth - innerWidth")


# What it shows


async def test_models_versions_and_their_figures_are_shown(page, url):
    await page.goto(url)
    await expect(page.get_by_role("heading", name="Models")).to_be_visible()
    row = page.get_by_role("listitem").filter(has=page.get_by_role("link", name="digits"))
    await expect(row).to_contain_text("2 of 4 versions ready")
    await expect(row).to_contain_text("v3 100 %")
    await expect(row.locator("dd").first).to_have_text(re.compile(r"^[1-9]\d\d/s$"))
    await page.get_by_role("link", name="digits").click()
    await expect(page.get_by_role("heading", name="digits", level=1)).to_be_focused()
    cards = page.locator(".version")
    assert [await card.locator("h3").inner_text() for card in await cards.all()] == [
        "Version 4", "Version 3", "Version 5", "Version 2",
    ]  # fmt: skip
    serving_card = cards.nth(1)
    await expect(serving_card.get_by_role("img", name="Batches by rows: 1 rows")).to_be_visible()
    sparkline = serving_card.get_by_role("img", name="Requests a second of version 3")
    await expect(sparkline).to_have_attribute("aria-label", re.compile(r"from [\d.]+/s to \d+/s"))
    await expect(serving_card).to_contain_text("cpu 1 not ready, no process, restarted 2 ×")
    await expect(cards.nth(3)).to_contain_text("an operator that is not known")


async def test_a_verdict_is_shown_with_its_bounds(page, url, plane):
    plane.errors = 0.4
    id_ = await start(plane, kill_switch=None)
    await page.goto(f"{url}/#/rollouts/digits/{id_}")
    await expect(page.locator(".rollout .badge").first).to_have_text("aborted")
    errors = page.locator(".verdict").filter(has_text="Failed requests")
    await expect(errors.locator(".badge")).to_have_text("fail")
    plot = errors.get_by_role("img", name="Canary less stable")
    await expect(plot).to_have_attribute(
        "aria-label", re.compile(r"change \+[\d.]+\spp \+[\d.]+\spp to \+[\d.]+\spp, limit \+1\spp")
    )
    await expect(
        errors.get_by_role("img", name=re.compile("^Measured, v4 .*, v3 "))
    ).to_be_visible()
    await expect(page.locator(".steps .stopped")).to_contain_text("stopped here")
    await expect(page.locator(".events .kind").first).to_have_text("rollout.aborted")
    assert await page.get_by_role("button", name="Retry").is_visible()
    assert not await page.get_by_role("button", name="Abort").is_visible()


async def test_what_comes_from_the_server_is_never_markup(page, watched, url, plane):
    plane._add_note("digits", "rollout.state", "<img src=/x onerror=alert(1)><b>bold</b>")
    await page.goto(f"{url}/#/events")
    await expect(page.locator(".events")).to_contain_text("<b>bold</b>")
    assert not [address for address in watched.addresses if address.endswith("/x")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
async def test_no_view_is_wider_than_its_window(browser, url, plane, scheme, width):
    id_ = await start(plane, baseline="equal_slice", match=[{"header": "x-canary", "value": "y"}])
    views = ["#/", "#/models/digits", f"#/rollouts/digits/{id_}", "#/rollouts", "#/events"]
    size = {"width": width, "height": 740}
    async with opened(browser, viewport=size, color_scheme=scheme) as watched:
        page = watched.page
        for view in views:
            await page.goto(f"{url}/{view}")
            await expect(page.locator("main li").first).to_be_visible()
            assert await width_beyond(page) <= 0, view
        await page.goto(f"{url}/admin/v1/docs")
        await page.locator("summary", has_text="Start a rollout").click()
        assert await width_beyond(page) <= 0, "docs"
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", background)[0]) < 100) is (scheme == "dark")


async def test_nothing_breaks_the_policy_or_leaves_the_origin(page, watched, url, plane):
    id_ = await start(plane)
    for path in ("/", "/#/models/digits", f"/#/rollouts/digits/{id_}", "/admin/v1/docs"):
        await page.goto(url + path)
        await expect(page.get_by_role("heading", level=1)).to_be_visible()
        await page.wait_for_load_state()
    await page.goto(f"{url}/#/models/digits")
    await expect(page.locator(".segment").first).to_be_visible()
    assert watched.complaints == []
    assert {urlsplit(address).netloc for address in watched.addresses} == {urlsplit(url).netloc}


# Rollouts by keyboard


async def test_a_rollout_starts_by_keyboard(page, url, plane):
    await page.goto(f"{url}/#/models/digits")
    await expect(page.get_by_role("button", name="Start a rollout")).to_be_visible()
    await tab_to(page, "Start a rollout")
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Start a rollout of digits")
    await expect(dialog).to_be_visible()
    await tab_to(page, "First mirror, percent")
    await page.keyboard.type("10")
    await page.keyboard.press("Enter")
    await expect(dialog).to_have_count(0)
    await expect(page.get_by_role("heading", name="Rollout of version 5")).to_be_visible()
    (made,) = plane.running.values()
    assert [step.weight_bp for step in made.spec.steps] == [0, 500, 2500, 5000]
    assert made.spec.steps[0].mirror_percent == 10
    assert made.spec.agreement.compare == "top1"


@pytest.mark.parametrize(
    ("button", "verb", "state"),
    [
        ("Pause", "pause", "paused (manual)"),
        ("Promote", "promote", "stepping"),
        ("Promote fully", "promote_full", "succeeded"),
        ("Abort", "abort", "aborted"),
    ],
)
async def test_a_rollout_is_led_by_keyboard(page, url, plane, button, verb, state):
    id_ = await start(plane)
    await page.goto(f"{url}/#/rollouts/digits/{id_}")
    await expect(page.get_by_role("button", name=button, exact=True)).to_be_visible()
    await tab_to(page, button)
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("Cancel")
    # What does harm is not what Enter does at once.
    focused = dialog.locator(":focus")
    await expect(focused).to_have_text("Cancel" if verb == "abort" else button)
    if verb == "abort":
        await tab_to(page, button)
    await page.keyboard.press("Enter")
    await expect(dialog).to_have_count(0)
    await expect(page.locator(".rollout .badge").first).to_have_text(state)
    assert plane.calls == [(verb, "digits", id_, "loopback")]
    await expect(page.locator("button:focus, h1:focus, h2:focus")).to_have_count(1)
    if verb == "promote":
        await expect(page.locator(".steps [aria-current=step]")).to_contain_text("25 %")
        await expect(page.get_by_role("log")).to_contain_text("stepping, step 2 of 2")


async def test_paused_is_resumed_and_aborted_is_retried(page, url, plane):
    id_ = await start(plane)
    await plane.command("digits", id_, "pause", "ci", None)
    await page.goto(f"{url}/#/models/digits")
    await page.get_by_role("button", name="Resume").click()
    await page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    await expect(page.locator(".rollout .badge").first).to_have_text("stepping")
    await plane.command("digits", id_, "abort", "ci", None)
    await page.get_by_role("link", name="version 3 to 4").click()
    await page.get_by_role("button", name="Retry").click()
    await page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    await expect(page.locator(".rollout dd").first).to_have_text("2")


async def test_escape_leaves_a_dialog_without_doing_anything(page, url, plane):
    id_ = await start(plane)
    await page.goto(f"{url}/#/rollouts/digits/{id_}")
    await page.get_by_role("button", name="Abort").click()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await expect(page.get_by_role("button", name="Abort")).to_be_focused()
    assert plane.calls == []


async def test_what_changed_under_a_dialog_is_asked_again(page, url, plane):
    id_ = await start(plane)
    await page.goto(f"{url}/#/rollouts/digits/{id_}")
    await page.get_by_role("button", name="Promote", exact=True).click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_be_visible()
    await plane.command("digits", id_, "pause", "somebody", None)
    await expect(page.locator(".rollout .badge").first).to_have_text("paused (manual)")
    await dialog.get_by_role("button", name="Promote").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("has changed")
    assert [call[0] for call in plane.calls] == ["pause"]
    await dialog.get_by_role("button", name="Promote").click()
    await expect(dialog).to_have_count(0)
    assert [call[0] for call in plane.calls] == ["pause", "promote"]


async def test_a_refused_rollout_says_why_and_keeps_the_form(page, url, plane):
    await page.goto(f"{url}/#/models/digits")
    await page.get_by_role("button", name="Start a rollout").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Canary's part").fill("50, 5")
    await dialog.get_by_role("button", name="Check only").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("weights must not fall")
    await dialog.get_by_label("Canary's part").fill("5, 50")
    await dialog.get_by_role("button", name="Check only").click()
    await expect(dialog.get_by_role("status")).to_contain_text("Nothing was started")
    await expect(dialog.get_by_role("alert")).to_have_count(0)
    assert not plane.running


async def test_the_first_tab_leads_past_the_header(page, url):
    await page.goto(url)
    await expect(page.get_by_role("link", name="digits")).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("main")).to_be_focused()
    await expect(page.get_by_role("link", name="digits")).to_be_visible()


# Who is looking, and whether the connection holds


async def test_a_key_is_exchanged_for_a_session(page, watched, url, plane):
    text = plane.add_key("viewer")
    await start(plane)
    await page.goto(f"{url}/#/models/digits")
    await page.get_by_label("API key").fill("igw_wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("key is not known")
    await page.get_by_label("API key").fill(text)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="digits", level=1)).to_be_focused()
    await expect(page.locator("#actor")).to_contain_text("(viewer)")
    await expect(page.get_by_role("heading", name="Rollout of version 4")).to_be_visible()
    assert not await page.get_by_role("button", name="Abort").is_visible()
    cookies = await page.context.cookies()
    assert [cookie["httpOnly"] for cookie in cookies] == [True]
    assert text not in await page.content()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("API key")).to_be_focused()
    assert await page.context.cookies() == []


async def test_a_session_that_ended_leads_to_the_sign_in(page, url, plane):
    text = plane.add_key("admin")
    await page.goto(url)
    await page.get_by_label("API key").fill(text)
    await page.keyboard.press("Enter")
    await expect(page.locator("#connection")).to_have_text("Live")
    (key,) = plane.keys()
    await plane.revoke_key(key.id, "somebody")
    plane.add_key("admin")
    await expect(page.get_by_role("alert")).to_contain_text("session has ended")


async def test_it_comes_back_after_the_server_does(page, browser, tmp_path):
    async with AsyncExitStack() as first:
        url = await first.enter_async_context(serving(LivePlane(tmp_path)))
        await page.goto(f"{url}/#/models/digits")
        await expect(page.locator("#connection")).to_have_text("Live")
        await expect(page.locator(".version")).to_have_count(4)
    await expect(page.locator("#connection")).to_contain_text("Connection lost")
    await expect(page.locator("body")).to_have_class("stale")
    await expect(page.locator(".version")).to_have_count(4)
    again = LivePlane(tmp_path)
    again.add_model("newcomer")
    async with serving(again, urlsplit(url).port):
        await expect(page.locator("#connection")).to_have_text("Live")
        await page.get_by_role("link", name="Models").click()
        await expect(page.get_by_role("link", name="newcomer")).to_be_visible()
        await expect(page.locator("body")).not_to_have_class("stale")


# The page to try the API


async def test_the_api_is_tried_from_its_page(page, url, plane):
    await page.goto(f"{url}/admin/v1/docs")
    operation = page.locator(".operation", has_text="Keep a rollout where it is")
    id_ = await start(plane)
    await operation.locator("summary").first.click()
    await operation.get_by_label("model").fill("digits")
    await operation.get_by_label("id", exact=True).fill(id_)
    await operation.get_by_role("button", name="Send").click()
    await expect(operation.get_by_role("status")).to_contain_text("200")
    await expect(operation.locator("pre")).to_contain_text('"state": "PAUSED"')
    await operation.get_by_label("id", exact=True).fill("unknown")
    await operation.get_by_role("button", name="Send").click()
    await expect(operation.get_by_role("status")).to_contain_text("404")


async def test_a_stream_is_shown_as_it_comes_until_it_is_stopped(page, url):
    await page.goto(f"{url}/admin/v1/docs")
    operation = page.locator(".operation", has_text="What happens now, once a second")
    await operation.locator("summary").first.click()
    await operation.get_by_role("button", name="Send").click()
    await expect(operation.locator("pre")).to_contain_text('"at_s"')
    await operation.get_by_role("button", name="Stop").click()
    await expect(operation.get_by_role("button", name="Stop")).to_be_hidden()
