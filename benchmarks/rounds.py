"""Side-by-side timing that noise, allocators and thread pools of one variant cannot tilt towards another.

Each variant lives in a process of its own. The parent lets one at a time do one unit of work, in rounds: A B C, then
C B A, and so on. Before each unit the same process multiplies two fixed float32 matrices. A round is discarded when
that probe ran below 80 % of its best in any of the processes: something else was on the machine. What is compared are
the ratios within rounds. "Faster" and "slower" are said only when the interquartile range of the ratios excludes 1 and,
since the range of ten readings does so by chance in one case of eight, when a sign test agrees.

Used by the other scripts in this folder, as `from rounds import Variant, run_rounds, compare`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], "dict[str, float] | None"]
"""One unit of work, such as a training step. What it returns is kept with the reading."""

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for the processes started from here, as hf_mae sets it for itself

QUIET = 0.8
"""A probe below this fraction of the best one means that the machine was busy."""

SIGNIFICANCE = 0.05
"""Two-sided level of the sign test."""

PROBE_SIZE = 768
"""Side of the probe's matrices: 0.9 GFLOP, which stays in the caches."""


# ------------------------------------------------------------------------------------------------ statistics


@dataclass(frozen=True)
class Ratio:
    """Paired ratios of two variants: their median, quartiles and number."""

    median: float
    low: float
    high: float
    n: int
    above: int
    """How many ratios are above 1."""
    below: int
    """How many are below 1."""

    @property
    def verdict(self) -> str:
        """`faster` if the ratios are above 1 beyond doubt, `slower` if they are below it, else `tie`.

        `too few` if not even an agreement of all ratios would pass the sign test.
        """
        if sign_test(self.n, 0) > SIGNIFICANCE:
            return "too few"
        if sign_test(self.above, self.below) > SIGNIFICANCE or self.low <= 1 <= self.high:
            return "tie"
        return "faster" if self.low > 1 else "slower"

    def __str__(self) -> str:
        return f"x{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n} {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, the verdict included, rounded for a record."""
        return {k: round(v, 4) for k, v in asdict(self).items()} | {"verdict": self.verdict}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 25th, 50th and 75th percentile, interpolated linearly as numpy does.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values is empty; quartiles need at least one, so let more rounds run or be kept")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below, above = math.floor(place), math.ceil(place)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    return at(0.25), at(0.5), at(0.75)


def paired_ratio(reference: Sequence[float], other: Sequence[float]) -> Ratio:
    """Compare two variants round by round.

    Args:
        reference: seconds (or another cost) of the variant that is compared with, one per round.
        other: the same of the variant in question.

    Returns:
        Ratios reference / other: above 1, the other is faster.

    Raises:
        ValueError: the lengths differ, or there are no rounds.
    """
    if len(reference) != len(other):
        raise ValueError(f"reference has {len(reference)} rounds and other {len(other)}; they are compared in pairs")
    ratios = [a / b for a, b in zip(reference, other, strict=True)]
    low, median, high = quartiles(ratios)
    return Ratio(median, low, high, len(ratios), sum(r > 1 for r in ratios), sum(r < 1 for r in ratios))


def sign_test(above: int, below: int) -> float:
    """Return the two-sided probability of a split at least this uneven when both sides are equally likely."""
    n = above + below
    tail = sum(math.comb(n, k) for k in range(min(above, below) + 1)) / 2**n
    return min(1.0, 2 * tail)


def quiet_rounds(probes: Sequence[Sequence[float]], fraction: float = QUIET) -> list[bool]:
    """Tell which rounds to keep.

    Args:
        probes: rates of the probe, one per variant in each round and in one order; higher is better.
        fraction: of the best rate of the same variant, since variants may have different numbers of threads.

    Returns:
        One boolean per round: True if none of its probes is below its limit.
    """
    best = [max(rates) for rates in zip(*probes, strict=True)]
    return [all(rate >= fraction * top for rate, top in zip(rates, best, strict=True)) for rates in probes]


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Variant:
    """One of the things compared. `build` is called in the variant's own process, so it must be a top-level function.

    Args:
        build: returns the unit of work, and facts about it for the record.
        arguments: keyword arguments of `build`.
        threads: of PyTorch in that process.
        environment: variables set before the process starts, such as those a thread pool reads at import.
    """

    build: Callable[..., tuple[Work, dict[str, Any]]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One variant in one round."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of the process with all its threads, those that only wait for others included."""
    probe: float
    """GFLOP/s of the probe just before."""
    load: float
    """Load average of the last minute."""
    rss: float
    """Largest resident memory of the process so far, MB."""
    extra: dict[str, float]
    """What the work returned."""


@dataclass(frozen=True)
class Run:
    """All rounds, and what each variant said of itself."""

    facts: dict[str, dict[str, Any]]
    rounds: list[dict[str, Reading]]
    quiet: float = QUIET
    """See `quiet_rounds`; 0 keeps everything."""

    @property
    def kept(self) -> list[dict[str, Reading]]:
        """The rounds during which the machine was quiet."""
        probes = [[reading.probe for reading in one.values()] for one in self.rounds]
        return [one for one, keep in zip(self.rounds, quiet_rounds(probes, self.quiet), strict=True) if keep]

    def values(self, name: str, measure: str = "wall") -> list[float]:
        """Return a measure of one variant over the kept rounds: a field of `Reading`, or a name in its `extra`."""
        readings = [one[name] for one in self.kept]
        return [r.extra[measure] if measure in r.extra else getattr(r, measure) for r in readings]


def run_rounds(
    variants: Mapping[str, Variant],
    *,
    rounds: int = 10,
    seconds: float = math.inf,
    warmup: int = 2,
    quiet: float = QUIET,
    say: Callable[[str], None] = print,
) -> Run:
    """Run all variants side by side.

    Args:
        variants: by name. All are built before the first round and stay in memory together.
        rounds: how many at most.
        seconds: stop before a round that would probably end later than this after the first one began.
        warmup: units of work that are not measured, per variant.
        quiet: see `quiet_rounds`; 0 keeps what a busy machine gave, for trials.
        say: receives a line of progress now and then.

    Raises:
        RuntimeError: a variant's process ended, or memory would not be enough for the next one.
    """
    workers: dict[str, _Worker] = {}
    taken: list[dict[str, Reading]] = []
    with _ending(workers):
        for name, variant in variants.items():
            begun, left = time.monotonic(), available_memory()
            largest = max((peak_memory(worker.process.pid) for worker in workers.values()), default=0.0)
            if left < 1.2 * largest:
                raise RuntimeError(
                    f"{left:.0f} MB of memory are left for {name} and the largest variant so far took "
                    f"{largest:.0f} MB; compare fewer variants at once, or a smaller batch"
                )
            workers[name] = _Worker(name, variant, warmup)
            memory = peak_memory(workers[name].process.pid)
            say(f"{name}: ready after {time.monotonic() - begun:.1f} s, {memory:.0f} MB")
        begun = time.monotonic()
        for index in range(rounds):
            names = list(variants) if index % 2 == 0 else list(variants)[::-1]
            readings = {name: workers[name].measure() for name in names}
            taken.append({name: readings[name] for name in variants})
            elapsed = time.monotonic() - begun
            if elapsed + elapsed / len(taken) > seconds:
                break
        run = Run({name: worker.facts for name, worker in workers.items()}, taken, quiet)
        took, discarded = time.monotonic() - begun, len(taken) - len(run.kept)
        say(f"{len(taken)} rounds in {took:.0f} s; {discarded} discarded: a probe below {quiet:.0%} of the best")
    return run


def call_apart(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a top-level function in a new process, so that its memory is given back.

    Raises:
        RuntimeError: the process ended with an error, which it has printed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_call, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed; its error is printed above") from None
    finally:
        process.join()


class Probe:
    """A fixed float32 matrix product."""

    def __init__(self, device: str = "cpu", size: int = PROBE_SIZE):
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
        self.out = torch.empty_like(self.a)  # given, so that no allocator has a part in it

    def __call__(self, repeats: int = 3) -> float:
        """Return GFLOP/s, the best of a few: a busy machine slows all of them, a hiccup only one."""
        best = math.inf
        for _ in range(repeats):
            wait_for(self.a.device)
            start = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            wait_for(self.a.device)
            best = min(best, time.perf_counter() - start)
        return 2 * len(self.a) ** 3 / best / 1e9


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Worker:
    """The parent's side of a variant's process."""

    def __init__(self, name: str, variant: Variant, warmup: int):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        # Not a daemon: a variant may start processes of its own. `_ending` sees to it that none is left.
        self.process = context.Process(target=_serve, args=(there, variant, warmup), daemon=False)
        with _environment(variant.environment):
            self.process.start()
        there.close()
        try:
            self.facts = self._receive()
        except RuntimeError:
            self.process.join()
            raise

    def measure(self) -> Reading:
        self.pipe.send("work")
        return self._receive()

    def end(self) -> None:
        self.pipe.close()  # the process takes the end of its pipe for the end of its work
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"the process of {self.name} ended; its error, if any, is printed above") from None


@contextmanager
def _ending(workers: dict[str, _Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in workers.values():
            worker.end()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, variant: Variant, warmup: int) -> None:
    torch.set_num_threads(variant.threads)
    work, facts = variant.build(**variant.arguments)
    probe = Probe(facts.get("device", "cpu"))
    for _ in range(warmup):
        work()
    pipe.send(facts)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        rate = probe()
        wall, cpu = time.perf_counter(), time.process_time()
        extra = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        pipe.send(Reading(wall, cpu, rate, os.getloadavg()[0], peak_memory(), extra or {}))


def _call(pipe: Connection, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    pipe.send(function(**arguments))
    pipe.close()


# ------------------------------------------------------------------------------------------------ reports and records


def compare(run: Run, name: str, measure: str = "wall", others: Sequence[str] | None = None) -> dict[str, Ratio]:
    """Return how much faster the named variant is than each other one, or than those named; none if no round was kept.

    Ratios are other / named: above 1, the named variant is faster.
    """
    if not run.kept:
        return {}
    mine = run.values(name, measure)
    names = [other for other in (run.facts if others is None else others) if other != name]
    return {other: paired_ratio(run.values(other, measure), mine) for other in names}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells in columns, the first row as head of a Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def describe_machine(packages: Sequence[str] = ("torch", "transformers", "timm", "numpy")) -> dict[str, Any]:
    """Return what a figure has to carry: date, commit, processor, its vector units, memory, versions and load."""
    fields = _fields_of("/proc/cpuinfo")
    flags = fields.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "flags": {name: name in flags for name in wanted},
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def readings_record(run: Run) -> dict[str, Any]:
    """Return facts and all readings, discarded rounds included, as plain data."""
    return {
        "facts": run.facts,
        "rounds": len(run.rounds),
        "discarded": len(run.rounds) - len(run.kept),
        "quiet": run.quiet,
        "readings": [{name: _rounded(asdict(reading)) for name, reading in one.items()} for one in run.rounds],
    }


def peak_memory(pid: int | None = None) -> float:
    """Return the largest resident memory of a process so far, in MB; of this one unless told."""
    value = _fields_of(f"/proc/{pid or 'self'}/status").get("VmHWM")
    if value is not None:
        return int(value.split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on a Mac; Linux would add the parent's


def available_memory() -> float:
    """Return the memory that new processes can have, in MB; infinite where the system does not say."""
    value = _fields_of("/proc/meminfo").get("MemAvailable")
    return math.inf if value is None else int(value.split()[0]) * 1024 / 1e6


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _rounded(v) if isinstance(v, dict) else round(v, 5) for k, v in values.items()}


def _fields_of(file: str) -> dict[str, str]:
    """Read `name: value` lines of a file of /proc; empty where there is none."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout, with a plus when files differ from it."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
