"""What torch can compute on here, and, where that is no GPU, why not: for people who set a machine up.

Nothing is allocated that stays, but a process that asked has a CUDA context until it ends: for short commands, not for the daemon.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Devices:
    gpu: Gpu | None
    reason: str | None = None  # why there is none
    driver: bool = False  # the kernel has NVIDIA's


def look() -> Devices:
    driver = _DRIVER.exists()
    if torch.version.cuda is None:
        return Devices(None, f"torch {torch.__version__} is built without CUDA", driver)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # torch warns of a driver that is too old, and then sees no GPU
            free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError, UserWarning) as error:
        return Devices(None, str(error).splitlines()[0], driver)
    return Devices(Gpu(torch.cuda.get_device_name(), total, free), driver=driver)
