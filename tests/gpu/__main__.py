"""`make gpu`: check and time the CUDA path on the machine's own GPU, in under 8 minutes, and print one table.

    python -m tests.gpu [--quick]     leaves with 0 if every check and bound holds, 1 if not, 2 where there is no GPU

The checks are the tests of this folder. The figures are of random weights in the shapes of Llama-3.1-8B and Qwen3-0.6B, in
bfloat16; `--quick` leaves the larger one out, and repeats less.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest
import torch


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description="Check and time the CUDA path."
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smaller model only, fewer repeats"
    )
    parser.add_argument("--no-checks", action="store_true", help="time only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "make gpu: no CUDA device, or a torch that was built without CUDA "
            f"(torch {torch.__version__}): nothing was checked",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    failed = False
    if not options.no_checks:
        arguments = ["-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
        failed = pytest.main([str(Path(__file__).parent), *arguments]) != 0
        print(
            f"checks: {'FAILED' if failed else 'passed'} in {time.monotonic() - began:.0f} s",
            flush=True,
        )
    from tests.gpu.timings import measure, table  # its imports take seconds

    figures = measure(quick=options.quick)
    print(table(figures))
    print(f"{time.monotonic() - began:.0f} s in all; checks {'FAILED' if failed else 'passed'}")
    return 1 if failed or not all(figure.holds for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
