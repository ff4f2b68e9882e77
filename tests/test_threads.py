from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mae.threads import allowed_cpus, choose_threads, cpu_quota, describe_threads

V1 = {"quota": "100000", "period": "50000"}


def tree(root: Path, cgroup: str, limits: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{k}": v for k, v in limits.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),  # of a group above
        ("0::/host/path\n", {"cpu.max": "100000 100000\n"}, 1.0),  # a container that sees the host's path
        ("4:cpu,cpuacct:/\n", {f"cpu,cpuacct/cpu.cfs_{k}_us": v for k, v in V1.items()}, 2.0),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/x\n", {"cpuset/x/cpu.cfs_quota_us": "1", "cpuset/x/cpu.cfs_period_us": "1"}, None),
        ("0::/\n", {"unified/cpu.max": "100000 100000"}, 1.0),  # both versions mounted
        ("garbage\n", {"cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_quota_of_control_groups(tmp_path, cgroup, limits, quota):
    assert cpu_quota(tree(tmp_path, cgroup, limits)) == quota


def test_no_quota_where_there_are_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "now", "processes", "threads"),
    [("100000", 8, 1, 1), ("150000", 8, 1, 1), ("50000", 8, 1, 1), ("400000", 8, 1, 4), ("400000", 8, 2, 2),
     ("400000", 2, 1, 2), ("max", 8, 1, 8)],
)  # fmt: skip
def test_threads_fit_the_quota(tmp_path, monkeypatch, limit, now, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("hf_mae.threads.allowed_cpus", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    root = tree(tmp_path, "0::/\n", {"cpu.max": f"{limit} 100000\n"})
    assert choose_threads(now, root) == threads
    assert ("quota" in describe_threads(threads, root)) == (limit != "max")
    monkeypatch.setenv("OMP_NUM_THREADS", str(now))  # the user's own number stays
    assert choose_threads(now, root) == now
    if now > threads:
        assert f"OMP_NUM_THREADS={threads}" in describe_threads(now, root)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_is_respected():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from hf_mae.threads import allowed_cpus, choose_threads; print(allowed_cpus(), choose_threads(64))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1", "1"]
    assert allowed_cpus() >= 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
@pytest.mark.parametrize("what", ["hf_mae", "hf_mae.cli", "hf_mae.recipes.mae"])
def test_spinning_is_limited_before_torch_is_loaded_unless_the_user_chose(given, expected, what):
    """libgomp reads it when it is loaded: a hook on the import of torch sees what it will see."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("at import of torch:", os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
import {what}
print("after:", os.environ.get("GOMP_SPINCOUNT"))
"""
    environment = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}} | given
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [f"at import of torch: {expected}", f"after: {expected}"]


def test_a_real_control_group_limits_the_threads():
    group = Path("/sys/fs/cgroup/cpu/hf_mae_test")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here ({error})")
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("100000")
        code = (
            f"import os; open('{group}/tasks', 'w').write(str(os.getpid()))\n"
            "from hf_mae.threads import choose_threads, describe_threads; print(choose_threads(8), describe_threads(1))"
        )
        environment = {k: v for k, v in os.environ.items() if k not in {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    assert out.stdout == "1 1 CPU thread each (a quota of 1 CPU)\n"
