"""A real browser without a window: the system's Chromium, driven by Playwright.

Debian's package is used as it is. Playwright's own build is not: it would be a second browser, from a second place.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no Chromium: install it (Debian, Ubuntu: apt-get install chromium); `make test` does so for root"


@contextmanager
def opened() -> Iterator[Browser]:
    """Raises FileNotFoundError where there is none: these tests are not skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(MISSING)
    # Root has no sandbox in a container, and /dev/shm may be small there. The pages are ours.
    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        try:
            yield browser
        finally:
            browser.close()
