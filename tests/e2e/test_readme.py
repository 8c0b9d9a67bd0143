"""The README's client examples work as pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"(?ms)^```python\n(.*?)^```", README.read_text(encoding="utf-8"))


LIBRARIES = ["openai", "websockets", "anthropic"]  # in the order of the examples


def test_there_is_an_example_for_each_transport():
    found = [re.findall(r"(?m)^from (\w+)", example) for example in EXAMPLES]
    assert [name in names for name, names in zip(LIBRARIES, found, strict=True)] == [True] * 3
    assert all("127.0.0.1:8321" in example for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=LIBRARIES)
def test_the_example_runs_as_pasted(daemon, example):
    code = example.replace("127.0.0.1:8321", daemon.url.removeprefix("http://"))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
