"""Limits of control groups, version 1, version 2 and both, on invented systems in tmp_path."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_core.hardware.cgroup import CgroupLimits, read_limits

GIB = 1 << 30

Files = dict[str, str]

V2_MOUNT = "24 18 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
ROOT_MOUNT = "18 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
V1_NONE = "9223372036854771712\n"  # how version 1 spells "no limit" on pages of 4 KiB


def write(root: Path, files: Files) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1_mount(controllers: str, root: str = "/", point: str | None = None) -> str:
    point = point or f"/sys/fs/cgroup/{controllers}"
    return f"31 23 0:28 {root} {point} rw - cgroup cgroup rw,{controllers}\n"


def v2_group(folder: str, *, limit: str, current: int = 0, cache: int = 0) -> Files:
    base = f"sys/fs/cgroup/{folder}"
    return {
        f"{base}/memory.max": limit + "\n",
        f"{base}/memory.current": f"{current}\n",
        f"{base}/memory.stat": f"anon 5\ninactive_file {cache}\nactive_file {cache}\n",
    }


def v1_group(folder: str, *, limit: str, usage: int = 0, stat: str = "") -> Files:
    base = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{base}/memory.limit_in_bytes": limit,
        f"{base}/memory.usage_in_bytes": f"{usage}\n",
        f"{base}/memory.stat": stat,
    }


def test_v2_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/kubepods/pod1/box\n",
        "proc/self/mountinfo": ROOT_MOUNT + V2_MOUNT,
        "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "max 100000\n",
        "sys/fs/cgroup/kubepods/pod1/cpu.max": "125000 50000\n",
        "sys/fs/cgroup/kubepods/cpu.max": "800000 100000\n",
        **v2_group("kubepods/pod1/box", limit="max"),
        # 8 GiB, 7 used, 2 x 2 of that cache: 5 left
        **v2_group("kubepods/pod1", limit=str(8 * GIB), current=7 * GIB, cache=2 * GIB),
        # 16 GiB, 15 used, none of it cache: 1 left, though the limit is not the smallest
        **v2_group("kubepods", limit=str(16 * GIB), current=15 * GIB),
    }
    limits = read_limits(write(tmp_path, files))
    assert limits == CgroupLimits(cpus=2.5, memory_bytes=8 * GIB, memory_headroom_bytes=GIB)


def test_v2_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user.slice\n",
        "proc/self/mountinfo": V2_MOUNT,
        **v2_group("user.slice", limit=str(8 * GIB), current=5 * GIB),
        "sys/fs/cgroup/user.slice/memory.high": f"{4 * GIB}\n",
    }
    limits = read_limits(write(tmp_path, files))
    assert (limits.memory_bytes, limits.memory_headroom_bytes) == (4 * GIB, 0)


def test_v2_namespace_shows_our_group_as_the_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        **v2_group("", limit=str(GIB), current=0),
    }
    assert read_limits(write(tmp_path, files)).cpus == 1.5
    write(tmp_path, {"proc/self/cgroup": "0::/../sibling\n"})
    assert read_limits(tmp_path).memory_bytes == GIB


def test_v1_hierarchies_are_found_by_controller(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/box\n3:cpuset:/\n2:cpu,cpuacct:/box/a b\n"
        "1:name=systemd:/\n0::/\n",
        "proc/self/mountinfo": v1_mount("memory")
        + v1_mount("cpu,cpuacct", point="/sys/fs/cgroup/cpu\\040all")
        + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cpu all/box/a b/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu all/box/a b/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu all/box/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu all/box/cpu.cfs_period_us": "200000\n",
        "sys/fs/cgroup/unified/cpu.max": "1000 100000\n",  # not the one in charge
        **v1_group(
            "box",
            limit=f"{4 * GIB}\n",
            usage=3 * GIB,
            stat=f"inactive_file 1\ntotal_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4}\n",
        ),
        **v1_group("", limit=V1_NONE),
    }
    limits = read_limits(write(tmp_path, files))
    assert limits == CgroupLimits(
        cpus=1.5, memory_bytes=4 * GIB, memory_headroom_bytes=GIB * 3 // 2
    )


def test_v1_container_mount_hides_the_groups_above(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n",
        "proc/self/mountinfo": v1_mount("memory", root="/docker/abc"),
        # no limit of its own, but 6 GiB by a group that the container cannot see
        **v1_group("", limit=V1_NONE, usage=GIB, stat=f"hierarchical_memory_limit {6 * GIB}\n"),
    }
    limits = read_limits(write(tmp_path, files))
    assert (limits.memory_bytes, limits.memory_headroom_bytes) == (6 * GIB, 5 * GIB)


def test_of_two_mounts_the_one_that_shows_more_is_read(tmp_path: Path) -> None:
    narrow = V2_MOUNT.replace(" / /sys/fs/cgroup ", " /pod/box /mnt/box ")
    for mounts in (narrow + V2_MOUNT, V2_MOUNT + narrow):
        files = {
            "proc/self/cgroup": "0::/pod/box\n",
            "proc/self/mountinfo": mounts,
            "mnt/box/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
        }
        assert read_limits(write(tmp_path, files)).cpus == 3


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/\n"},
        {"proc/self/cgroup": "0::/gone\n", "proc/self/mountinfo": ROOT_MOUNT + V2_MOUNT},
        {
            "proc/self/cgroup": "4:memory:/\n2:cpu:/\n",
            "proc/self/mountinfo": v1_mount("memory") + v1_mount("cpu"),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            **v1_group("", limit=V1_NONE),
        },
    ],
)
def test_no_limit_is_none(files: Files, tmp_path: Path) -> None:
    assert read_limits(write(tmp_path, files)) == CgroupLimits()
