"""Which GPU there is, and why there is none: torch's own words, on one line."""

import warnings

import pytest
import torch

from engine import device
from engine.device import look

pytestmark = pytest.mark.torch


@pytest.fixture
def cuda_build(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
    (tmp_path / "version").touch()


def test_a_build_without_cuda_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found = look()
    assert found.gpu is None
    assert "built without CUDA" in found.reason


def test_a_gpu_is_named_and_measured(cuda_build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 8))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    found = look()
    assert (found.gpu.name, found.gpu.free_bytes, found.gpu.total_bytes) == ("Card", 7, 8)
    assert found.driver


def test_what_torch_says_of_a_driver_it_cannot_use_is_the_reason(cuda_build, monkeypatch):
    def too_old():
        warnings.warn("The NVIDIA driver on your system is too old\nand more", UserWarning, 2)

    def none():
        raise RuntimeError("No CUDA GPUs are available")

    for fails, reason in ((too_old, "driver on your system is too old"), (none, "No CUDA GPUs")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
        found = look()
        assert found.gpu is None
        assert reason in found.reason
        assert "\n" not in found.reason
