"""`make campaign`: all campaigns at full size, or the one that is named, with its own options."""

from __future__ import annotations

import sys

from tests.campaign import (
    cancels,
    flips,
    floods,
    forced,
    full_disk,
    fuzz,
    hundred,
    idle,
    isolation,
    kills,
    overload,
    round_trips,
    schema,
    sigterms,
    soak,
    truncations,
)

CAMPAIGNS = {
    "kills": kills.main,
    "flips": flips.main,
    "truncations": truncations.main,
    "full_disk": full_disk.main,
    "round_trips": round_trips.main,
    "cancels": cancels.main,
    "overload": overload.main,
    "sigterms": sigterms.main,
    "floods": floods.main,
    "idle": idle.main,
    "isolation": isolation.main,
    "fuzz": fuzz.main,
    "schema": schema.main,
    "soak": soak.main,
    "hundred": hundred.main,
    "forced": forced.main,
}


def main(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        if argv[0] not in CAMPAIGNS:
            print(f"no campaign {argv[0]!r}; there are {', '.join(CAMPAIGNS)}", file=sys.stderr)
            return 2
        return CAMPAIGNS[argv[0]](argv[1:])
    # Each one to its end, whatever came out of the others.
    return max([campaign(argv) for campaign in CAMPAIGNS.values()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
