"""What a browser sees of the dashboard: a script, not a test; any Python that has playwright runs it.

    python browser_dashboard.py URL CHROMIUM DIRECTORY

Reads one word per line from stdin and answers each with one line of JSON on stdout; screenshots go to DIRECTORY.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright  # type: ignore[import-not-found, unused-ignore]

SECONDS = 20_000  # milliseconds, as playwright counts
PHONE = {"width": 390, "height": 844}
ENGINES_SAY = """() => { const rows = [...document.querySelectorAll("#engines tbody tr")];
    const says = (row) => row.lastChild.textContent !== "\\u2013" || row.textContent.includes("unreachable");
    return rows.length && rows.every(says); }"""
PAINTED = """(canvas) => { const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return data.some((value) => value); }"""


def table(page: Page, name: str) -> list[list[str]]:
    rows = page.get_by_role("table", name=name, exact=True).locator("tbody tr")
    return [[cell.inner_text().strip() for cell in row.locator("td").all()] for row in rows.all()]


def idle(page: Page) -> dict[str, object]:
    page.get_by_text("No update is running.").wait_for(timeout=SECONDS)
    page.locator("#link", has_text="live").wait_for(timeout=SECONDS)
    return {"ranks": table(page, "Ranks"), "fleet": page.locator("#fleet").inner_text()}


def running(page: Page) -> dict[str, object]:
    page.locator("#progress").wait_for(timeout=SECONDS)
    page.locator("#now-state", has_text="updating").wait_for(timeout=SECONDS)
    return {
        "state": page.locator("#now-state").inner_text(),
        "bars": page.locator("#by-rank .track").count(),
        "workers": [row[2] for row in table(page, "Ranks")],
    }


def over(page: Page) -> dict[str, object]:
    page.locator("#detail-section").wait_for(timeout=SECONDS)
    page.wait_for_function(ENGINES_SAY)
    if page.locator("#timeline").count():
        page.locator(".lanes canvas").first.wait_for()
    works = page.locator("#works")
    if works.count():
        works.locator("summary").click()
    return {
        "updates": table(page, "Last updates"),
        "title": page.locator("#h-detail").inner_text(),
        "stages": table(page, "Stages") if page.get_by_role("table", name="Stages").count() else [],
        "works": [row.inner_text().split("\n") for row in works.locator(".row").all()],
        "timeline": page.locator(".lanes .rank").all_inner_texts(),
        "lanes": page.locator(".lanes ul").first.inner_text().split("\n") if page.locator(".lanes").count() else [],
        "bound": page.locator("#timeline > p").first.inner_text() if page.locator("#timeline").count() else "",
        "columns": page.locator("#history .columns div").count(),
        "problem": page.locator("#detail pre").all_inner_texts(),
        "engines": table(page, "Engines") if page.get_by_role("table", name="Engines").count() else [],
    }


def spans(page: Page) -> dict[str, object]:
    """The timeline of the first rank, read with the arrow keys and with the pointer, and taken home."""
    lanes = page.locator(".lanes canvas")
    read = []
    lanes.first.focus()
    for key in ("Home", "ArrowRight", "End"):
        page.keyboard.press(key)
        read.append(page.locator("#span").inner_text())
    box = lanes.last.bounding_box() or {"x": 0.0, "y": 0.0, "width": 0.0, "height": 0.0}
    for step in range(int(box["width"])):  # along the first lane, until there is something
        page.mouse.move(box["x"] + step, box["y"] + 7)
        if (pointed := page.locator("#span").inner_text()) != read[-1]:
            break
    with page.expect_download() as download:
        page.locator("#download").click()
    trace = json.loads(Path(download.value.path()).read_text())
    painted = [canvas.evaluate(PAINTED) for canvas in lanes.all()]
    return {"read": read, "pointed": pointed, "painted": painted, "events": len(trace["traceEvents"])}


def dark(page: Page) -> dict[str, object]:
    page.emulate_media(color_scheme="dark")
    back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return {"back": back}


def keyboard(page: Page) -> dict[str, object]:
    """Tab from the top: what gets the focus; then the oldest update is opened with Enter."""
    page.reload()
    page.locator("#detail-section").wait_for(timeout=SECONDS)
    reached = []
    for _ in range(1 + page.locator("#updates button").count()):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.textContent"))
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Enter")
    chosen = page.locator("#updates button[aria-pressed=true]").inner_text()
    kept = page.evaluate("() => document.activeElement.textContent")
    return {
        "reached": reached,
        "outline": outline,
        "chosen": chosen,
        "kept": kept,
        "title": page.locator("#h-detail").inner_text(),
    }


def phone(page: Page) -> dict[str, object]:
    page.set_viewport_size(PHONE)
    width = page.evaluate("() => document.documentElement.scrollWidth")
    small = page.evaluate("""() => [...document.querySelectorAll("button, input")].filter((e) => e.offsetParent)
        .filter((e) => e.getBoundingClientRect().height < 32).map((e) => e.textContent)""")
    return {"width": width, "small": small}


def cancel(page: Page) -> dict[str, object]:
    page.locator("#cancel").focus()
    page.keyboard.press("Enter")
    page.get_by_text("No update is running.").wait_for(timeout=SECONDS)
    return over(page)


def main(url: str, chromium: str, directory: Path) -> None:
    steps = {f.__name__: f for f in (idle, running, over, spans, keyboard, phone, dark, cancel)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(SECONDS)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        elsewhere: list[str] = []
        page.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
        page.goto(url)
        for number, word in enumerate(sys.stdin):
            answer = steps[word.strip()](page)
            page.screenshot(path=directory / f"{number}-{word.strip()}.png", full_page=True)
            print(json.dumps({**answer, "complaints": complaints, "elsewhere": elsewhere}), flush=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
