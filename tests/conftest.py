"""Hypothesis profiles: `dev` while writing (seconds), `ci` by default, `campaign` for nights, `mutants` for planted bugs.

Without a GPU, Triton interprets its kernels; it must know before anybody imports it.
"""

import os
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

if not Path("/proc/driver/nvidia/version").exists():
    os.environ["TRITON_INTERPRET"] = "1"

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=_slow)
settings.register_profile("ci", max_examples=300, deadline=None, suppress_health_check=_slow)
settings.register_profile("campaign", max_examples=3000, deadline=None, suppress_health_check=_slow)
# A planted bug need not be shrunk, and must be caught every time.
settings.register_profile(
    "mutants",
    max_examples=300,
    deadline=None,
    suppress_health_check=_slow,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    print_blob=False,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
