"""`homeport bench tiers`, on blocks so few that only its own workings are tested, not the machine."""

import argparse

import pytest

from broker.bench import raw_disk, tiers
from broker.bench.moves import Bench, Growth
from tiers.store import Way

LAYER = 16 << 10


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tiers.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize("compact", ["off", "int8"])
def test_every_move_is_measured_and_everything_is_removed_again(compact, tmp_path, capsys):
    sizes = (
        "--blocks",
        "12",
        "--block-bytes",
        str(2 * LAYER),
        "--rounds",
        "2",
        "--turnover",
        "2",
        "--lengths",
    )
    status = tiers.main(arguments("--dir", str(tmp_path), "--compact", compact, *sizes))
    printed = capsys.readouterr()
    assert not list(tmp_path.iterdir())
    if status:  # where /tmp is in memory, the answer is a reason
        assert "O_DIRECT" in printed.err
        return
    for row in (
        "memcpy", "device -> host", "host -> device", "host -> disk", "O_DIRECT write",
        "disk -> device, cold", "disk -> device, warm", "O_DIRECT read", "file / live after 2 x",
    ):  # fmt: skip
        assert f"\n{row}" in printed.out
    assert "checksums" in printed.out


def test_a_size_that_no_block_has_is_wrong_usage(tmp_path, capsys):
    assert tiers.main(arguments("--dir", str(tmp_path), "--block-bytes", "1000")) == 2
    assert "multiple of 16384" in capsys.readouterr().err


def test_turnover_replaces_everything_and_keeps_the_file_small(tmp_path):
    bench = Bench(tmp_path, layers=1, blocks=64, readers=2, compact="off")
    growth = Growth(bench)
    for times in range(1, 6):
        growth.turn_over()
        assert growth.written == 1 + times
    assert 1 <= growth.file_over_live < 1.6  # two commits' worth of 64 blocks, and the small tables


def test_bytes_that_are_believed_unchecked_are_so_only_inside_the_measurement(tmp_path):
    bench = Bench(tmp_path, layers=1, blocks=4, readers=2, compact="off")
    bench.fill()
    data = bytearray(bench.data.read_bytes())
    at = data.index(bytes(bench.host.view(2)[:64]))
    data[at] ^= 1
    bench.data.write_bytes(data)
    bench._restore("row", [False])
    assert bench.unchecked["row"]
    with pytest.raises(AssertionError):
        bench._restore("row", [True])


def test_blocks_come_by_the_fastest_way_that_there_is(tmp_path):
    """Where a place, a slot or a record's head is not as it should be, restores are right, and slow."""
    bench = Bench(tmp_path, layers=3, blocks=6, readers=2, compact="off")
    bench.fill()
    bench._restore("warm", [True])
    assert set(bench.ways["warm"]) == {Way.CACHED}
    if raw_disk.is_direct(tmp_path):
        bench._restore_cold()
        assert set(bench.ways["disk -> device, cold"]) == {Way.DIRECT}


def test_a_file_is_read_whole_past_the_cache(tmp_path):
    if not raw_disk.is_direct(tmp_path):
        return
    file = tmp_path / "file"
    file.write_bytes(bytes(9 << 20))
    before = raw_disk.bytes_from_disk()
    assert raw_disk.read_s(file, 3) > 0
    assert raw_disk.bytes_from_disk() - before >= 9 << 20
    assert raw_disk.write_s(tmp_path / "other", 1 << 20) > 0
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
