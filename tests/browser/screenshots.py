"""Pictures of the dashboard over a busy daemon, to be looked at.

    python -m tests.browser.screenshots [folder]

light.png, dark.png and narrow.png: a stub daemon whose sessions are in all tiers, and one of them chosen.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.browser import chromium
from tests.browser.harbour import Harbour
from tests.campaign.zygote import Zygote

STEPS, PACE_MS = 16, 600
SHOTS = {  # {name: (colours, width, height)}
    "light": ("light", 1280, 900),
    "dark": ("dark", 1280, 900),
    "narrow": ("light", 360, 800),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as state,
        Zygote() as zygote,
        Harbour(zygote, Path(state) / "state", "admission.max_turns=2") as harbour,
    ):
        harbour.fill()
        with chromium.opened() as browser:
            for name, (colours, width, height) in SHOTS.items():
                page = browser.new_page(
                    color_scheme=colours,
                    viewport={"width": width, "height": height},
                    reduced_motion="reduce",
                )
                page.goto(harbour.url)
                page.locator("#session-rows tr").first.wait_for()
                for step in range(STEPS):  # a picture of time needs some
                    harbour.turn(f"agent-{step % 9}", 1 + step % 3)
                    harbour.demote(f"agent-{(step + 4) % 9}", ("host", "disk")[step % 2])
                    page.wait_for_timeout(PACE_MS)
                page.get_by_role("button", name="agent-2").click()
                while not page.locator("#running li").count():  # until a look finds some at work
                    for number in range(6):  # more than the two that may run
                        harbour.turn(f"agent-{number}", background=True, max_output_tokens=600)
                    page.wait_for_timeout(200)
                page.screenshot(path=folder / f"{name}.png", full_page=True)
                page.close()
                print(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("dashboard-pictures"))
