"""How many CPU threads a process should use, and what they do while they wait. Standard library only.

Imported by the package before torch: OpenMP reads its environment when its library is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

SPIN_COUNT = 10_000
"""Rounds that an idle OpenMP thread spins before it sleeps. libgomp's default, 300,000 and more, makes two threads that
share a core with one other busy process 6 times slower; this value costs nothing on a machine of one's own (measured on
2 cores: benchmarks/README.md, "A busy machine")."""


def limit_spinning() -> None:
    """Set `GOMP_SPINCOUNT` for this process and its children, unless the user has set it or `OMP_WAIT_POLICY`.

    Has an effect on this process only before libgomp is loaded, that is before torch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def allowed_cpus() -> int:
    """Return the CPUs that the scheduler may give this process: all, or those of its affinity (taskset, Slurm)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU time that the control groups of this process allow it, in CPUs; None without a limit.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`) of the process's own group and of every group above it; the
    smallest holds. Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.

    Args:
        root: where `proc` and `sys` lie; another folder in tests.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    mount, limits = root / "sys/fs/cgroup", []
    for _, controllers, group in (parts for parts in groups if len(parts) == 3):
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        bases = [mount / controllers, mount / "cpu"] if controllers else [mount, mount / "unified"]
        # Inside a container the group's path may be that of the host, which is not there: its mount is the group.
        above = PurePosixPath(group)
        for level in (above, *above.parents):
            limits += [_limit(base / level.relative_to("/")) for base in bases if level.is_absolute()]
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def _limit(group: Path) -> float | None:
    """Return quota over period of one group, None where it has no limit or does not exist."""
    try:
        if (both := group / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        limit = float(quota) / float(period) if quota != "max" else -1.0
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None


def choose_threads(now: int, root: Path = Path("/")) -> int:
    """Return how many threads a process should compute with: at least 1, at most `now`.

    A quota of CPU time is a budget for all threads: with more of them than it has CPUs, the kernel stops them all for
    the rest of every period. Processes that one launcher started on this machine (`LOCAL_WORLD_SIZE`) share it.

    Args:
        now: threads that torch uses: the cores of the affinity, or `OMP_NUM_THREADS`. A number from the environment
            stays as it is.
        root: see `cpu_quota`.
    """
    return now if _from_environment() else min(now, _share(root)[0])


def describe_threads(threads: int, root: Path = Path("/")) -> str:
    """Return the threads of a process in words, with what limits them, for the first line of a run."""
    share, limit = _share(root)
    text = f"{threads} CPU thread{'s' if threads > 1 else ''} each"
    if threads > share and (name := _from_environment()):
        return f"{text} (more than {limit}: {name}={share} may be faster)"
    return f"{text} ({limit})" if limit else text


def _from_environment() -> str | None:
    return next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ), None)


def _share(root: Path) -> tuple[int, str]:
    """Return the CPUs of one process, rounded down to whole ones, and what limits them; empty if all of the machine."""
    quota, cpus, processes = cpu_quota(root), allowed_cpus(), max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    limit = f"{cpus} of {os.cpu_count()} CPUs by affinity" if cpus < (os.cpu_count() or 1) else ""
    if quota is not None and quota < cpus:
        cpus, limit = quota, f"a quota of {quota:g} CPU{'s' if quota > 1 else ''}"
    if processes > 1:
        limit = f"{limit or f'{cpus} CPUs'} for {processes} processes"
    return max(1, int(cpus / processes)), limit
