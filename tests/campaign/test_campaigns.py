"""Every campaign at a size that fits into the suite. The full sizes: `make campaign`."""

import pytest

from tests.campaign import kills
from tests.campaign.zygote import Zygote


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


def test_killed_daemons_lose_nothing_acknowledged_and_restore_nothing_wrong(zygote, tmp_path):
    assert kills.campaign(zygote, tmp_path, kills=kills.QUICK, seed=1) == 0
