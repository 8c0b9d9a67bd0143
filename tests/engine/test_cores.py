"""Who uses the cores beside us, and how many threads are left for the kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.cores import WINDOW_S, Cores, Used, used


class Machine:
    """Cores on which others and we use so much, from one look to the next."""

    def __init__(
        self, threads: int = 4, readers: int = 4, *, cores: int | None = None, tells: bool = True
    ) -> None:
        self.now, self.others_s, self.ours_s = 100.0, 0.0, 0.0
        self.tells = tells
        self.cores = Cores(
            threads, readers, lambda: self.now, cores=cores or threads, look=self.look
        )

    def look(self) -> Used | None:
        return Used(self.others_s + self.ours_s, self.ours_s) if self.tells else None

    def step(
        self, *, others: float = 0.0, ours: float = 2.0, seconds: float = 1.25 * WINDOW_S
    ) -> int:
        """A step's threads, after a time in which so many cores were used."""
        self.now += seconds
        self.others_s += others * seconds
        self.ours_s += ours * seconds
        return self.cores.threads(reading=False)


def test_all_threads_compute_where_nobody_else_does():
    machine = Machine()
    assert [machine.step(ours=3.9) for _ in range(9)] == [4] * 9


@pytest.mark.parametrize(("others", "left"), [(0.3, 4), (0.5, 3), (1.0, 3), (1.5, 2), (9.0, 1)])
def test_a_core_that_others_use_is_left_to_them_and_one_is_always_ours(others, left):
    machine = Machine()
    machine.step()
    assert machine.step(others=others) == left


def test_a_core_comes_back_when_others_are_done_and_does_not_change_hands_in_between():
    machine = Machine()
    machine.step()
    seen = [machine.step(others=each) for each in (0.5, 0.3, 0.5, 0.3, 0.1, 0.3)]
    assert seen == [3, 3, 3, 3, 4, 4]


def test_what_was_seen_before_a_pause_says_nothing():
    machine = Machine()
    machine.step()
    assert machine.step(others=1.0) == 3
    assert machine.step(others=1.0, ours=0.1, seconds=60.0) == 4
    assert machine.step(others=1.0) == 3


def test_a_step_longer_than_a_look_is_no_pause():
    machine = Machine()
    machine.step()
    assert machine.step(others=1.0, seconds=3.0) == 3


def test_a_look_takes_its_time():
    """The kernel counts in hundredths of a second: in a tenth of a look one of them would be half a core."""
    machine = Machine()
    machine.step()
    assert machine.step(others=1.0, seconds=WINDOW_S / 10) == 4


@pytest.mark.parametrize(
    ("threads", "readers", "left"), [(1, 4, 1), (2, 4, 1), (4, 1, 3), (16, 4, 12)]
)
def test_readers_are_left_half_of_the_cores_at_most_and_only_while_they_read(
    threads, readers, left
):
    machine = Machine(threads, readers)
    assert machine.cores.threads(reading=True) == left
    assert machine.cores.threads(reading=False) == threads


def test_cores_that_we_were_not_given_are_others_first():
    machine = Machine(threads=4, readers=4, cores=6)
    machine.step()
    assert [machine.step(others=each) for each in (1.0, 2.0, 3.0, 9.0)] == [4, 4, 3, 1]
    assert Machine(threads=4, readers=4, cores=16).cores.threads(reading=True) == 4


def test_readers_and_others_may_use_the_same_core():
    machine = Machine(threads=4, readers=1)
    machine.step()
    assert machine.step(others=2.0) == 2
    assert machine.cores.threads(reading=True) == 2


def test_where_the_kernel_does_not_tell_nobody_else_is_there(tmp_path):
    machine = Machine(tells=False)
    assert [machine.step(others=3.0) for _ in range(5)] == [4] * 5
    assert used(tmp_path / "nothing") is None


def test_only_what_runs_on_our_own_cores_counts_and_neither_waiting_nor_a_hypervisor(tmp_path):
    mine, other = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0)) + 1
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        f"cpu{mine} 100 20 3 7000 800 40 5 600 70 80\n"
        f"cpu{other} 100 20 3 7000 800 40 5 600 70 80\n"
        "intr 1 2 3\n"
        "ctxt 5\n"
    )
    seen = used(stat)
    assert seen is not None
    assert seen.everybody_s == pytest.approx(168 / os.sysconf("SC_CLK_TCK"))


def test_this_machine_tells_what_we_use():
    before = used()
    assert before is not None
    while (after := used()).ours_s < before.ours_s + 0.1:
        sum(range(10_000))
    assert after.everybody_s > before.everybody_s


def test_the_first_kernel_does_not_change_how_many_threads_torch_has():
    """A process of its own: there is one first kernel in each."""
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; torch.set_num_threads(1)\n"
            "from engine import paged_cpu; paged_cpu.warm_up(torch.float32)\n"
            "print(torch.get_num_threads(), paged_cpu.threads())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["1", "1"]
