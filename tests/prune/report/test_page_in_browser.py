# SPDX-License-Identifier: Apache-2.0
"""The report page in a real browser: an installed Chromium, driven by Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heapr_vllm.prune.report.page import write_page
from tests.prune.report.test_page import HOSTILE, page_path, pruned

pytestmark = pytest.mark.long

__all__ = ["page_path", "pruned"]  # fixtures
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "light"), (1280, "dark"), (390, "dark")], ids=str)
def opened(request: pytest.FixtureRequest, browser: Any, page_path: Path) -> Iterator[Any]:
    """The page with all charts drawn. Fails on any message of the console, and on any request but the page's own."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda each: requests.append(each.url))
    page.goto(page_path.as_uri())
    page.wait_for_selector("body[data-drawn]")
    yield page
    page.close()
    assert not messages
    assert [url for url in requests if not url.startswith("data:")] == [page_path.as_uri()]


def test_it_fits_and_shows_every_chart(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for chart in opened.query_selector_all(".chart"):
        box = chart.query_selector("svg").bounding_box()
        assert box["width"] > 200 and box["height"] > 50
        assert box["x"] + box["width"] <= opened.viewport_size["width"], "nothing sticks out"
    for header in filter(lambda each: each.is_visible(), opened.query_selector_all("tbody th")):
        assert header.bounding_box()["width"] > 60, header.inner_text()
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, each) => sum + +each, 0)"
    is_dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (opened.evaluate(luminance) < 200) == is_dark
    assert opened.locator("svg .role-axis-label text").first.get_attribute("fill") == opened.evaluate("colour('faint')")


def test_hover_names_the_expert(opened: Any) -> None:
    cells = opened.locator("#widths-0 .mark-rect.role-mark path")
    assert cells.count() == 24, "3 layers of 8 experts"
    cells.nth(10).hover()
    tooltip = opened.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    layer = opened.evaluate("specs['widths-0'].datasets.layers[1]")
    share = layer["tokens"][2] / layer["routes"]
    words = tooltip.inner_text().split()
    expected = f"module {layer['module']} layer {layer['layer']} expert 2 width {layer['width'][2]} of {layer['full']}"
    assert words == [*expected.split(), "routing", "share", f"{share:.2%}"]


def test_a_tap_and_the_arrow_keys_read_out(opened: Any) -> None:
    output = opened.locator("output").first
    opened.locator("#widths-0 .mark-rect.role-mark path").nth(10).click()
    assert output.inner_text().startswith("layer 1, expert 2: width ")
    for key, words in (("ArrowLeft", "layer 1, expert 1"), ("ArrowUp", "layer 0, expert 1"), ("ArrowUp", "layer 0,")):
        opened.keyboard.press(key)
        assert output.inner_text().startswith(words)


def test_tab_reaches_every_control(opened: Any) -> None:
    wanted = opened.evaluate(
        "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter(each => each.checkVisibility())"
        ".map((each, number) => (each.dataset.stop = number, number))"
    )
    reached = []
    for _ in wanted:
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("Number(document.activeElement.dataset.stop)"))
    assert reached == wanted, "all of them, in the order of the page"


def test_colours_follow_the_system(opened: Any) -> None:
    before = opened.evaluate("colour('ink')")
    is_dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    opened.emulate_media(color_scheme="light" if is_dark else "dark")
    after = opened.evaluate("colour('ink')")
    assert after != before
    for chart in ("widths-0", "loss-stored", "speed-chart"):
        title = opened.locator(f"#{chart} svg .role-axis-title text").first
        sync_api.expect(title).to_have_attribute("fill", after)


def test_numbers_at_the_edge(browser: Any, pruned: Path, tmp_path: Path) -> None:
    """No loss predicted, no curve, no interval: nothing that Vega complains about."""
    folder = tmp_path / "edge"
    shutil.copytree(pruned, folder)
    frontier = json.loads((folder / "heapr/frontier.json").read_text())
    (tmp_path / "rows.csv").write_text("arm,tok_s\ndense,10\npruned,12\n")
    page = browser.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    for loss, kept in ((0.0, 0), (0.0, 5), (1e-3, 0), (1e-3, 1)):
        edge = {**frontier, **{kind: frontier[kind][:kept] for kind in ("stored", "executed")}}
        edge["chosen"] = {**frontier["chosen"], "loss_increase": loss}
        (folder / "heapr/frontier.json").write_text(json.dumps(edge))
        write_page([folder], tmp_path / "page.html", speed=tmp_path / "rows.csv")
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("body[data-drawn]")
        assert page.locator("#loss-stored svg").count() == (1 if loss and kept else 0)
    assert not messages
    page.close()


def test_the_policy_stops_scripts(browser: Any, page_path: Path, tmp_path: Path) -> None:
    """Even if a name were not escaped."""
    (tmp_path / "page.html").write_text(page_path.read_text().replace("<h1>", f"<h1>{HOSTILE}"))
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("body[data-drawn]")
    assert page.title() != "run"
    page.close()
