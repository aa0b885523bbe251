"""Cores that a process may use: affinity, and the quotas of made-up cgroup trees."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from qkernels.cli import common, diagnosis
from qkernels.cli.main import main
from qkernels.machine import Cores, find_cores, oversubscribed


def tree(root: Path, cgroup: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A made-up /proc/self; `{root}` in `mounts` is where the files are."""
    proc = root / "proc"
    (proc / "task").mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts.format(root=root))
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return proc


@pytest.fixture
def cores64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


V2 = "31 23 0:28 / {root}/cg rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n22 1 0:5 / / rw - ext4 /dev/sda rw\n"
V1 = (
    "32 31 0:29 / {root}/cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / {root}/cg/memory rw - cgroup cgroup rw,memory\n"
)
V1_LINES = "4:memory:/a\n2:cpu,cpuacct:/a/b\n1:name=systemd:/a\n"


@pytest.mark.usefixtures("cores64")
@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "quota"),
    [
        ("0::/\n", V2, {}, None),
        ("0::/a/b\n", V2, {"cg/a/b/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", V2, {"cg/a/b/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", V2, {"cg/a/b/cpu.max": "max 100000\n", "cg/a/cpu.max": "150000 100000\n"}, 1.5),  # around it
        ("0::/a/b\n", V2, {"cg/a/b/cpu.max": "50000 100000\n", "cg/a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/a\n", V2, {"cg/b/cpu.max": "100000 100000\n"}, None),  # another's
        ("0::/../../host/a\n", V2, {"cg/cpu.max": "400000 100000\n"}, 4.0),  # a path outside the namespace
        # The host's path, and a container's part of the tree at the mount point; a mount point with a space in it.
        ("0::/docker/7\n", V2.replace(" / {root}/cg", " /docker/7 {root}/cg"), {"cg/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/docker/7\n", V2.replace(" / {root}/cg", " /other {root}/cg"), {"cg/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a\n", V2.replace("/cg", "/c\\040g"), {"c g/a/cpu.max": "100000 50000\n"}, 2.0),
        (V1_LINES, V1, {}, None),
        (
            V1_LINES,
            V1,
            {"cg/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n", "cg/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        (
            V1_LINES,
            V1,
            {"cg/cpu,cpuacct/a/b/cpu.cfs_quota_us": "250000\n", "cg/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
    ],
)
def test_quotas(tmp_path: Path, cgroup: str, mounts: str, files: Mapping[str, str], quota: float | None) -> None:
    assert find_cores(tree(tmp_path, cgroup, mounts, files)) == Cores(64, quota)


@pytest.mark.usefixtures("cores64")
@pytest.mark.parametrize("text", ["", "lots 100000\n", "200000 0\n", "-5 100000\n", "200000\n", "\xff"])
def test_a_quota_that_makes_no_sense_is_said_and_the_others_count(tmp_path: Path, text: str) -> None:
    files = {"cg/a/cpu.max": text, "cg/cpu.max": "300000 100000\n"}
    found = find_cores(tree(tmp_path, "0::/a\n", V2, files))
    assert (found.affinity, found.quota, len(found.unread)) == (64, 3.0, 1)
    assert "cg/a/cpu.max: " in found.unread[0]


@pytest.mark.usefixtures("cores64")
def test_files_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    proc = tree(tmp_path, "0::/a\n", V2, {})
    (tmp_path / "cg" / "a" / "cpu.max").mkdir(parents=True)  # reading it fails even for root
    assert "Is a directory" in find_cores(proc).unread[0]
    for name, text in (("cgroup", "no colons\n"), ("mountinfo", "31 23\n")):
        proc = tree(tmp_path / name, "0::/a\n", V2, {})
        (proc / name).write_text(text)
        found = find_cores(proc)
        assert (found.quota, len(found.unread)) == (None, 1), name


@pytest.mark.usefixtures("cores64")
def test_no_cgroups_are_no_quota(tmp_path: Path) -> None:
    assert find_cores(tmp_path) == Cores(64)


def test_the_affinity_is_that_of_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_PROC_BIND ties the main thread to one core, and each thread of the pool to its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda task: {task % 4})
    for task in (0, 1, 2, 6):
        (tmp_path / "task" / str(task)).mkdir(parents=True)
    assert find_cores(tmp_path).affinity == 3


@pytest.mark.parametrize(
    ("cores", "usable"), [(Cores(8), 8), (Cores(8, 2.5), 2), (Cores(8, 0.3), 1), (Cores(2, 16), 2)]
)
def test_usable_cores_are_whole_and_at_least_one(cores: Cores, usable: int) -> None:
    assert cores.usable == usable
    assert oversubscribed(cores, usable) is None
    assert f"OMP_NUM_THREADS={usable}," in str(oversubscribed(cores, usable + 1))


def test_doctor_says_so_and_stays_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(diagnosis, "find_cores", lambda: Cores(64, 2.0, ("/cg/cpu.max: no number",)))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert (
        "64 of torch, 2 cores (affinity: 64, cgroup quota: 2); a quota could not be read: /cg/cpu.max: no number"
        in shown
    )
    assert "torch.set_num_threads(2)" in shown
    assert "it works, and there is advice" in shown


@pytest.mark.parametrize(("device", "threads", "warned"), [("cpu", 3, True), ("cpu", 2, False), ("cuda:0", 3, False)])
def test_commands_warn_on_standard_error(
    device: str, threads: int, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(common, "find_cores", lambda: Cores(2))
    common.warn_of_threads(torch.device(device))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("warning: torch runs 3 threads") == warned
