"""How a report looks in Chromium: at a phone's width and a desk's, dark, and in print, after it was used a little.

    pip install playwright
    python -m tests.endurance.report_in_browser demo/report.html --output shots

Prints script errors, requests to anywhere, and what is wider than the page; there should be none. The pictures are for
people to look at.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SCREENS: dict[str, dict[str, Any]] = {
    "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2},
    "desk": {"viewport": DESK},
    "dark": {"viewport": DESK, "color_scheme": "dark"},
}
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def look(browser: Any, report: Path, screen: str, output: Path) -> list[str]:
    """What is wrong on that screen, in words; `output` gets the page before and after some use, and a desk's print."""
    page = browser.new_context(**SCREENS[screen]).new_page()
    address = report.resolve().as_uri()
    wrong: list[str] = []
    said: list[tuple[str, str]] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("console", lambda line: said.append((line.type, line.text)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.screenshot(path=output / f"{screen}.png", full_page=True)
    for summary in page.locator("summary").all()[:2]:
        summary.click()
    page.locator("input[type=search]").fill("how")
    for button in page.get_by_role("button", name="show", exact=True).all()[:1]:
        button.click()
    page.wait_for_timeout(500)
    page.screenshot(path=output / f"{screen}-used.png", full_page=True)
    if (excess := page.evaluate(TOO_WIDE)) > 0:
        wrong.append(f"wider than the page by {excess} pixels")
    wrong += [f"console: {text}" for kind, text in said if kind in ("error", "warning")]
    wrong += [f"request: {url}" for url in asked if not url.startswith(address)]
    if screen == "desk":
        page.pdf(path=output / "print.pdf")
    return wrong


def main() -> int:
    """Exit code 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, default=Path("shots"))
    parser.add_argument(
        "--chromium", default="/usr/bin/chromium", help="its program; playwright's own where it is none"
    )
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    args.output.mkdir(parents=True, exist_ok=True)
    program = args.chromium if Path(args.chromium).is_file() else None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        found = {screen: look(browser, args.report, screen, args.output) for screen in SCREENS}
    for screen, wrong in found.items():
        print(f"{screen}: {'; '.join(wrong) or 'nothing wrong'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
