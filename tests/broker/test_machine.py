"""What a machine gives us, read from made-up /proc and /sys."""

from broker.machine import cores, cpu_flags, file_system, memory, nearest_directory, open_files

GIB = 1 << 30


def machine(root, **files):
    """Files by path, dots for slashes in the keys' names: proc__meminfo."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(total, available=None, swap=0):
    lines = [f"MemTotal: {total >> 10} kB", f"SwapTotal: {swap >> 10} kB"]
    if available is not None:
        lines.append(f"MemAvailable: {available >> 10} kB")
    return "\n".join(lines)


def test_memory_is_what_is_built_in_where_nothing_limits_it(tmp_path):
    found = memory(machine(tmp_path, proc__meminfo=meminfo(64 * GIB, 60 * GIB, 8 * GIB)))
    assert (found.usable_bytes, found.limited, found.available_bytes, found.swap_bytes) == (
        64 * GIB, False, 60 * GIB, 8 * GIB
    )  # fmt: skip
    assert found.huge_pages is None
    found = memory(machine(tmp_path / "old", proc__meminfo=meminfo(4 * GIB)))
    assert found.available_bytes is None


def test_a_control_groups_limit_counts_also_one_above_ours(tmp_path):
    root = machine(
        tmp_path,
        proc__meminfo=meminfo(64 * GIB, 60 * GIB),
        proc__self__cgroup="0::/user.slice/ours.scope\n",
        sys__fs__cgroup__memoryDOTmax="max\n",
        sys__fs__cgroup__userDOTslice__memoryDOTmax=f"{8 * GIB}\n",
        sys__fs__cgroup__userDOTslice__oursDOTscope__memoryDOTmax="max\n",
    )
    found = memory(root)
    assert (found.usable_bytes, found.limited) == (8 * GIB, True)
    assert found.available_bytes == 8 * GIB


def test_the_older_control_groups_limit_counts_and_their_no_limit_does_not(tmp_path):
    for limit, usable in ((8 * GIB, 8 * GIB), (0x7FFFFFFFFFFFF000, 64 * GIB)):
        root = machine(
            tmp_path / str(limit),
            proc__meminfo=meminfo(64 * GIB),
            sys__fs__cgroup__memory__memoryDOTlimit_in_bytes=f"{limit}\n",
        )
        assert memory(root).usable_bytes == usable


def test_a_quota_of_the_processors_time_counts_as_cores(tmp_path):
    group = {"proc__self__cgroup": "0::/\n"}
    assert (
        cores(machine(tmp_path / "a", **group, sys__fs__cgroup__cpuDOTmax="100000 100000\n")) == 1
    )
    assert cores(machine(tmp_path / "b", **group, sys__fs__cgroup__cpuDOTmax="50000 100000")) == 1
    unlimited = cores(machine(tmp_path / "c", **group, sys__fs__cgroup__cpuDOTmax="max 100000"))
    assert unlimited == cores(tmp_path / "nothing") >= 1


def test_a_path_has_the_file_system_of_the_nearest_mount_and_of_the_last_there(tmp_path):
    inner = tmp_path / "with space" / "inner"
    inner.mkdir(parents=True)
    mounts = "\n".join(
        [
            "dev / overlay rw 0 0",
            f"dev {tmp_path}/with\\040space ext4 rw 0 0",
            f"dev {tmp_path}/with\\040space nfs4 rw 0 0",
            f"dev {tmp_path}/with xfs rw 0 0",
        ]
    )
    root = machine(tmp_path / "root", proc__self__mounts=mounts)
    assert file_system(inner / "not" / "yet", root).kind == "nfs4"
    assert file_system(tmp_path, root).kind == "overlay"
    assert file_system(tmp_path, tmp_path / "none").kind == "unknown"
    assert nearest_directory(inner / "not" / "yet") == inner


def test_huge_pages_and_flags_are_read(tmp_path):
    root = machine(
        tmp_path,
        proc__meminfo=meminfo(GIB),
        proc__cpuinfo="processor : 0\nflags\t\t: fpu avx2 fma\n",
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never\n",
    )
    assert memory(root).huge_pages == "madvise"
    assert cpu_flags(root) == {"fpu", "avx2", "fma"}
    assert cpu_flags(tmp_path / "none") == frozenset()


def test_this_machine_answers():
    assert memory().usable_bytes > 0
    assert cores() >= 1
    assert open_files().soft != 0
