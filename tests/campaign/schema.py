"""Schemathesis on the OpenAPI document that the daemon serves: what a stranger makes of it, and a judge who is not ours.

    pip install 'homeport[fuzz]'
    python -m tests.campaign.schema [--minutes 60] [--seed 1] [--quick]

Passes if schemathesis finds no answer of 500 and more (but refusals under load), none whose status, content type or body
the document does not promise, no method that is served unsaid and no `Allow` that is not true; and if the daemon's log has
no fault. What the document cannot say (which strings a model understands) is not judged: a well-formed body may be refused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.campaign.fuzz import SETTINGS
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import faults
from tests.campaign.zygote import StubDaemon, Zygote

QUICK_EXAMPLES = 10
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "missing_required_header",
)


def campaign(zygote: Zygote, folder: Path, *, effort: tuple[str, ...], seed: int) -> int:
    """The exit status. `effort`: how long, in schemathesis' own options."""
    verdict = Verdict("schema", seed)
    command = Path(sys.executable).with_name("schemathesis")
    if not command.exists():
        sys.exit("schema: this needs schemathesis: pip install 'homeport[fuzz]'")
    with StubDaemon(zygote, folder / "state", SETTINGS) as daemon:
        run = subprocess.run(
            [
                str(command),
                "run",
                f"{daemon.url}/openapi.json",
                *effort,
                f"--checks={','.join(CHECKS)}",
                f"--seed={seed}",
                "--request-timeout=300",
                "--continue-on-failure",
                "--warnings=off",
                "--no-color",
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(run.stdout, file=sys.stderr)
        verdict.require(run.returncode == 0, "schemathesis has found something: see above")
        verdict.require(daemon.ended() is None, "the daemon ended")
        verdict.require(daemon.terminate() == 0, "it did not end well")
        for line in faults(daemon.log.read_text(errors="replace"))[:20]:
            verdict.violation(line)
    cases = next((x.strip() for x in run.stdout.splitlines() if " generated, " in x), "no cases")
    verdict.require("generated" in cases, "nothing was tried")
    return verdict.finish({"cases": cases}, cases)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_EXAMPLES} examples an operation"
    )
    arguments = parser.parse_args(argv)
    effort = (f"--max-time={max(1, round(arguments.minutes * 60))}",)
    if arguments.quick:
        effort = (f"--max-examples={QUICK_EXAMPLES}",)
    with tempfile.TemporaryDirectory(prefix="homeport-schema-") as folder, Zygote() as zygote:
        return campaign(zygote, Path(folder), effort=effort, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
