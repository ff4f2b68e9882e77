"""`hf-mae doctor`: what this machine has, and with `--train` whether training works on it.

Every part of `--train` is an ordinary run of the package on images made here, in a process of its own, so that one that
crashes or hangs says so in its row and the next begins. Rows are compared by what the runs record: losses in
metrics.jsonl, SHA-256 sums in the manifests of their checkpoints.

    python -m hf_mae.doctor CASE.json       one part; started by `check_training`, by torchrun for several processes
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import hf_mae
from hf_mae.recipes.base import Augment, Data, Engine, Evals, Model, Optim, Recipe, Schedule, from_dict, to_dict
from hf_mae.threads import allowed_cpus, cpu_quota, describe_threads

PACKAGES = (
    *("torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "huggingface_hub", "safetensors"),
    *("numpy", "pillow", "simplejpeg", "pyarrow", "tyro", "evaluate", "scikit-learn"),
)

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "track": (("tensorboard", "trackio"), "--engine.track has nothing to write to"),
    "birds": (("cv2",), "hf-mae background does not run"),
    "demo": (("gradio",), "hf-mae demo does not run"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "hf-mae export --target onnx does not run"),
}
"""Optional parts: the modules of each, and what is lost without them."""

MINUTES = 8.0
"""Time that `--train` takes at most; what does not fit is left out and said."""

CASE_SECONDS = 180.0
"""A part that has not ended by then hangs."""

STEPS = 12
"""Updates of each training run; the first of them are not timed."""
WARM = 4

LOSS_TOLERANCE = {"float32": 1e-4, "bf16": 3e-2}
"""Largest relative difference of the losses of the first updates from those of one process in float32. Sums in another
order differ by about 1e-6, bfloat16 by about 1e-3; a wrong gradient or mask differs by far more."""

Status = Literal["ok", "note", "failed", "skipped"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""
    """What to do, or what it costs to leave it."""


# ------------------------------------------------------------------------------------------------ what is there


def describe_machine(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows on software, devices, threads, memory, disk, the Hub and optional parts; and a record of them.

    The record names no user, no token and no folder.

    Args:
        folder: where runs would be written, for the disk.
    """
    rows: list[Row] = []
    record: dict[str, Any] = {"hf_mae": hf_mae.__version__, "python": platform.python_version()}
    record["platform"] = platform.platform()
    record["packages"] = {name: _version(name) for name in PACKAGES}
    rows.append(Row("hf_mae", f"{hf_mae.__version__}, Python {record['python']}, {record['platform']}"))
    rows.append(Row("packages", ", ".join(f"{k} {v}" for k, v in record["packages"].items() if v)))
    for part in (_devices, _threads, _memory, _decoders):
        found, facts = part()
        rows += found
        record |= facts
    disk, facts = _disk(folder)
    rows += disk
    record |= facts
    hub, facts = _hub()
    rows.append(hub)
    record |= facts
    missing = {}
    for name, (modules, cost) in EXTRAS.items():
        if absent := [m for m in modules if importlib.util.find_spec(m) is None]:
            missing[name] = absent
            rows.append(
                Row(f"extra {name}", f"without {', '.join(absent)}", "note", f"{cost}: pip install 'hf_mae[{name}]'")
            )
        else:
            rows.append(Row(f"extra {name}", ", ".join(modules)))
    record["missing_extras"] = missing
    return rows, record


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[list[Row], dict[str, Any]]:
    import torch
    import torch.cuda.nccl

    rows, gpus = [], []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": facts.name,
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "capability": f"{facts.major}.{facts.minor}",
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
        slow = "" if gpus[-1]["bf16"] else "no bfloat16 units: use --engine.precision fp16"
        rows.append(Row(f"GPU {index}", f"{facts.name}, {gpus[-1]['memory_gib']} GiB", "note" if slow else "ok", slow))
    record: dict[str, Any] = {"gpus": gpus, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if gpus:
        record |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        rows.append(Row("CUDA", f"{torch.version.cuda}, cuDNN {record['cudnn']}, NCCL {record['nccl']}"))
    elif torch.accelerator.is_available():
        record["accelerator"] = str(torch.accelerator.current_accelerator())
        rows.append(Row("device", record["accelerator"], "note", "never tested with this package"))
    else:
        built = torch.version.cuda or torch.version.hip
        remedy = (
            "torch was built for GPUs and sees none: look at the driver" if built else "for GPUs install another torch"
        )
        rows.append(Row("GPU", "none", "note", f"training runs on the CPU; {remedy}"))
    return rows, record


def _threads() -> tuple[list[Row], dict[str, Any]]:
    import torch

    quota, spin = cpu_quota(), os.environ.get("GOMP_SPINCOUNT", os.environ.get("OMP_WAIT_POLICY", "default"))
    record = {
        "cpus": os.cpu_count(),
        "allowed_cpus": allowed_cpus(),
        "cpu_quota": quota,
        "cpu_threads": torch.get_num_threads(),
        "spin_count": spin,
        "processor": _processor(),
    }
    text = f"{describe_threads(torch.get_num_threads())} of {os.cpu_count()} CPUs, idle threads spin {spin} rounds"
    rows = [Row("processor", record["processor"]), Row("threads", text)]
    return rows, record


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
        return ", ".join(sorted(names)) or platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def _memory() -> tuple[list[Row], dict[str, Any]]:
    import psutil

    memory = psutil.virtual_memory()
    record = {"memory_gib": round(memory.total / 2**30, 1), "memory_available_gib": round(memory.available / 2**30, 1)}
    return [Row("memory", f"{record['memory_available_gib']} of {record['memory_gib']} GiB available")], record


def _decoders() -> tuple[list[Row], dict[str, Any]]:
    from PIL import features

    turbo = bool(features.check_feature("libjpeg_turbo"))
    lacking = [name for name in ("webp", "jpg_2000", "avif") if not features.check(name)]
    rows = [
        Row("JPEG decoder", "libjpeg-turbo")
        if turbo
        else Row("JPEG decoder", "Pillow alone", "note", "slower: Pillow has another libjpeg than simplejpeg")
    ]
    if lacking:
        rows.append(Row("image formats", f"without {', '.join(lacking)}", "note", "such files count as damaged"))
    return rows, {"libjpeg_turbo": turbo, "missing_formats": lacking}


def _disk(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    rows, record = [], {}
    for name, place, other in (("runs", folder, "--out"), ("Hub cache", Path(HF_HUB_CACHE), "HF_HOME")):
        there = next((p for p in (place.absolute(), *place.absolute().parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(there).free / 2**30
        writable = os.access(there, os.W_OK)
        record[f"disk_free_gib_{name.replace(' ', '_').lower()}"] = round(free, 1)
        low = "a ViT-B checkpoint takes 1.3 GB, a ViT-H one 8 GB" if free < 20 else ""
        row = Row(f"disk for {name}", f"{free:.1f} GiB free", "note" if low else "ok", low)
        rows.append(row if writable else replace(row, status="failed", remedy=f"not writable: choose another {other}"))
    return rows, record


def _hub() -> tuple[Row, dict[str, Any]]:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    remedy = "only public models and data sets can be read, and nothing published: hf auth login"
    if constants.HF_HUB_OFFLINE:
        return Row("Hub", "offline (HF_HUB_OFFLINE)", "note", "only what is in the cache can be loaded"), {
            "hub": "offline"
        }
    token = get_token()
    if token is None:
        return Row("Hub", "not logged in", "note", remedy), {"hub": "no token"}
    try:
        name = HfApi().whoami(token=token)["name"]
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        return Row("Hub", f"the token is refused ({status})", "note", remedy), {"hub": "refused"}
    except Exception as error:  # whatever the network raises: it is not reachable, and the rest goes on
        return Row("Hub", f"not reachable ({type(error).__name__})", "note", "network, or HF_ENDPOINT"), {
            "hub": "unreachable"
        }
    return Row("Hub", f"logged in as {name}"), {"hub": "logged in"}


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of `--train`."""

    name: str
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    deterministic: bool = False
    resume_from: str | None = None
    """Name of the case whose middle checkpoint is continued."""
    decode_only: bool = False
    """Measure how fast images are decoded, without a model."""


def make_cases(gpus: int) -> list[Case]:
    """Return what is run with so many GPUs, the most telling first."""
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    several = gpus if gpus else 2
    cases = [Case(name="float32"), Case(name="bf16", precision="bf16"), Case(name="resume", resume_from="float32")]
    if gpus:
        cases += [
            Case(name="deterministic", deterministic=True),
            Case(name="deterministic-resume", deterministic=True, resume_from="deterministic"),
        ]
    if several > 1:
        cases.append(Case(name="ddp", processes=several))
    if gpus > 1:  # on CPUs Accelerate takes no notice of FSDP
        cases.append(Case(name="fsdp2", processes=gpus, environment=fsdp))
        cases.append(Case(name="fsdp2-bf16", processes=gpus, environment=fsdp, precision="bf16"))
    cases.append(Case(name="decoding", decode_only=True))
    cases.append(Case(name="float32-compiled", compile=True))
    if gpus:
        cases.append(Case(name="bf16-compiled", compile=True, precision="bf16"))
    return cases


def make_recipe(case: Case, images: Path, out: Path, gpus: int, resume: Path | None) -> Recipe:
    """Return the recipe of a case: ViT-B at 224 pixels on GPUs, a small model at 64 pixels on CPUs."""
    if gpus:
        model, batch = Model(), 64 * max(1, gpus)
    else:
        model = Model(
            image_size=64, patch_size=8, hidden_size=192, num_hidden_layers=6, num_attention_heads=3,
            decoder_hidden_size=96, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        )  # fmt: skip
        batch = 32
    return Recipe(
        name="doctor",
        source="hf-mae doctor",
        expected="not measured",
        out=str(out),
        max_steps=STEPS,
        global_batch=batch,
        log_every=1,
        save_every=STEPS // 2,
        eval_every=10 * STEPS,
        num_workers=max(1, min(8, allowed_cpus() // max(1, case.processes))),
        resume=str(resume) if resume else "auto",
        data=Data(path=str(images)),
        model=model,
        augment=Augment(),
        optim=Optim(base_lr=1e-3),
        schedule=Schedule(warmup_epochs=0),
        evals=Evals(pictures=0, knn=False, rankme=False, at_start=False),
        engine=Engine(
            precision=case.precision,
            compile=case.compile,
            expect_processes=case.processes,
            deterministic=case.deterministic,
        ),
    )


def make_images(folder: Path, count: int, side: int) -> None:
    """Write JPEGs of smooth noise, which compress like photographs do; the same at every call."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:04d}.jpg", quality=90)


@dataclass
class Outcome:
    """What came of a case."""

    case: Case
    error: str = ""
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    images_per_second: float | None = None
    memory_gib: float | None = None
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the last checkpoint's weights and optimizer state."""


def check_training(
    gpus: int,
    *,
    only: Sequence[str] = (),
    minutes: float = MINUTES,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Train on this machine in all the ways it allows, and compare.

    Args:
        gpus: devices to use; 0 trains on the CPU.
        only: names of the cases to run, with those that they continue; none is all.
        minutes: time for all of it; a case that would begin later is left out.
        say: is told what is going on.

    Returns:
        Rows for the table; a record of each case.

    Raises:
        ValueError: a name in `only` is unknown.
    """
    cases = make_cases(gpus)
    names = [case.name for case in cases]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"case {unknown[0]!r} is unknown; use one of {', '.join(names)}")
    wanted = {*only, *(c.resume_from for c in cases if c.name in only)}
    cases = [case for case in cases if not only or case.name in wanted]
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="hf_mae_doctor_") as temporary:
        folder = Path(temporary)
        make_images(folder / "images", 256, 320 if gpus else 160)
        for case in cases:
            left = deadline - time.monotonic()
            if left < 20:
                outcomes[case.name] = Outcome(case, error="skipped: the time is over")
                continue
            say(f"{case.name} ...")
            outcomes[case.name] = _run_case(case, folder, gpus, left, outcomes)
    rows = [_judge(outcome, outcomes, gpus) for outcome in outcomes.values()]
    return rows, [_as_record(o, r) for o, r in zip(outcomes.values(), rows, strict=True)]


def _run_case(case: Case, folder: Path, gpus: int, seconds: float, before: Mapping[str, Outcome]) -> Outcome:
    outcome, out = Outcome(case), folder / case.name
    resume = None
    if case.resume_from is not None:
        resume = folder / case.resume_from / "checkpoints" / f"step_{STEPS // 2:08d}"
        if before[case.resume_from].error or not resume.is_dir():
            outcome.error = f"skipped: {case.resume_from} did not run"
            return outcome
    recipe = make_recipe(case, folder / "images", out, gpus, resume)
    job = out.with_suffix(".json")
    job.write_text(json.dumps({"case": asdict(case), "recipe": to_dict(recipe), "cpu": not gpus}))
    launcher = [sys.executable]
    if case.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.processes)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if not gpus else {"CUDA_VISIBLE_DEVICES": "0"} if case.processes == 1 else {}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | hidden | dict(case.environment)
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*launcher, "-m", "hf_mae.doctor", str(job)],
            env=environment, capture_output=True, text=True, timeout=min(seconds, CASE_SECONDS), errors="replace",
        )  # fmt: skip
        if done.returncode:
            outcome.error = _last_words(done.stderr) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        cut = "skipped: the time is over" if seconds < CASE_SECONDS else f"did not end within {CASE_SECONDS:.0f} s"
        outcome.error = cut
    outcome.seconds = round(time.perf_counter() - started, 1)
    found = job.with_suffix(".result.json")
    if not outcome.error and found.exists():
        for name, value in json.loads(found.read_text()).items():
            setattr(outcome, name, value)
    return outcome


def _last_words(text: str) -> str:
    """Return the line of an output that says what went wrong: the last that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "error:" in line]
    return (named or lines or [""])[-1][:300]


def _judge(outcome: Outcome, outcomes: Mapping[str, Outcome], gpus: int) -> Row:
    case = outcome.case
    if outcome.error.startswith("skipped"):
        return Row(case.name, outcome.error.removeprefix("skipped: "), "skipped")
    if outcome.error:
        return Row(case.name, outcome.error, "failed", "attach the JSON file to a report")
    rate = f"{outcome.images_per_second:,.0f} images/s" if outcome.images_per_second else "no rate"
    memory = f", {outcome.memory_gib:.1f} GiB" if outcome.memory_gib else ""
    if case.decode_only:
        eats = max((o.images_per_second or 0 for o in outcomes.values() if o.losses), default=0)
        slow = bool(eats) and (outcome.images_per_second or 0) < eats
        remedy = "the step waits for its data: more CPU cores, --num-workers, --data.decoder fast" if slow else ""
        return Row(case.name, f"{rate} decoded; the fastest step takes {eats:,.0f}", "note" if slow else "ok", remedy)
    if not outcome.losses or not all(map(math.isfinite, outcome.losses)):
        return Row(case.name, f"losses {outcome.losses}", "failed", "the loss is not finite: do not train this way")
    if case.resume_from is not None:
        same = outcome.digests == outcomes[case.resume_from].digests
        text = "the same bits as without a stop" if same else "other bits than without a stop"
        if same:
            return Row(case.name, text)
        promised = case.deterministic or not gpus  # kernels of GPUs may sum in any order
        remedy = "report this" if promised else "as expected of GPUs; --engine.deterministic keeps the bits"
        return Row(case.name, text, "failed" if promised else "note", remedy)
    reference = outcomes.get("float32")
    apart = ""
    if case.processes > 1:
        rate = f"{case.processes} processes, {rate}"
    if reference is not None and reference.losses and reference is not outcome:
        kind = "bf16" if case.precision == "bf16" else "float32"
        far = max(abs(a - b) / abs(b) for a, b in zip(outcome.losses[:3], reference.losses[:3], strict=False))
        apart = f", losses {far:.1e} from float32"
        if far > LOSS_TOLERANCE[kind]:
            return Row(case.name, f"{rate}{memory}{apart}", "failed", f"more than {LOSS_TOLERANCE[kind]:g}")
    return Row(case.name, f"{rate}{memory}{apart}")


def _as_record(outcome: Outcome, row: Row) -> dict[str, Any]:
    return asdict(outcome) | {"status": row.status, "says": row.value}


def _measure(job: Path) -> None:
    """Run a case in this process, and write what came of it beside its file."""
    given = json.loads(job.read_text())
    recipe = from_dict(given["recipe"], Recipe)
    if given["case"]["decode_only"]:
        result: dict[str, Any] = {"images_per_second": _decode(recipe)}
    else:
        result = _train(recipe)
    if os.environ.get("RANK", "0") == "0":
        job.with_suffix(".result.json").write_text(json.dumps(result))


def _train(recipe: Recipe) -> dict[str, Any]:
    import torch

    from hf_mae.pretrain import pretrain

    out = pretrain(recipe)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if row["step"] > WARM]
    manifest = json.loads((out / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())
    weights = {name: digest for name, (_, digest) in manifest.items() if name.endswith(".safetensors")}
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_memory()
    return {
        "losses": [row["loss"] for row in rows],
        "images_per_second": statistics.median(rates) if rates else None,
        "memory_gib": round(memory / 2**30, 2) if memory else None,
        "digests": weights,
    }


def _peak_memory() -> int | None:
    """Return the largest resident memory of this process in bytes, None on systems that do not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _decode(recipe: Recipe, seconds: float = 4.0) -> float:
    """Return the images per second that the loader decodes and crops."""
    from hf_mae.data.loader import Loader
    from hf_mae.data.order import Order, choose_lanes_and_window
    from hf_mae.data.sources import open_source
    from hf_mae.models.configuration_mae import height_width

    source = open_source(recipe.data)
    order = Order(source.sizes, recipe.seed, *choose_lanes_and_window(source.sizes, source.bytes_per_row, recipe.data))
    with Loader(
        source, order, augment=recipe.augment, image_size=height_width(recipe.model.image_size), channels=3,
        global_batch=recipe.global_batch, num_workers=recipe.num_workers, depth=1,
    ) as batches:  # fmt: skip
        stream = iter(batches)
        for _ in range(2):
            next(stream)
        started, images = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            images += len(next(stream).pixel_values)
    return round(images / passed, 1)


# ------------------------------------------------------------------------------------------------ the command


def examine(
    out: Path, *, train: bool = False, only: Sequence[str] = (), say: Callable[[str], None] = lambda text: None
) -> bool:
    """Look at this machine, print a table, and write a record to attach to a report.

    Args:
        out: the JSON file; one that another `doctor` wrote is replaced.
        train: train as well, in all the ways this machine allows.
        only: see `check_training`.
        say: prints a line.

    Returns:
        Whether nothing has failed.

    Raises:
        ValueError: `out` holds something else or cannot be written, or `only` is given without `train` or is unknown.
    """
    if only and not train:
        raise ValueError(f"only={' '.join(only)} names parts of the training check; add --train")
    if out.exists() and not _is_report(out):
        raise ValueError(f"out={out} exists and is not a report of this command; choose another --out")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out}: there is no folder {out.parent}; make it, or choose another --out")
    rows, record = describe_machine(Path("runs"))
    for line in table(rows):
        say(line)
    if train:
        import torch

        gpus = torch.cuda.device_count()
        say(f"training on {f'{gpus} GPU(s)' if gpus else 'the CPU'}, at most {MINUTES:g} minutes")
        trained, record["training"] = check_training(gpus, only=only, say=say)
        for line in table(trained):
            say(line)
        rows += trained
    failed = [row.name for row in rows if row.status == "failed"]
    record["rows"] = [asdict(row) for row in rows if row.name != "Hub"]
    record = {"report": "hf-mae doctor", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | record
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, out)
    verdict = f"failed: {', '.join(failed)}" if failed else "nothing failed"
    say(f"{verdict}; written to {out}" + ("" if train else "; --train checks that training works here"))
    return not failed


def _is_report(path: Path) -> bool:
    try:
        return json.loads(path.read_text()).get("report") == "hf-mae doctor"
    except (OSError, ValueError, AttributeError):
        return False


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines of text; what is not in order says so, with the remedy."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        mark = "" if row.status == "ok" else f"{row.status}: "
        remedy = f" ({row.remedy})" if row.remedy else ""
        lines.append(f"  {row.name:<{width}}  {mark}{row.value}{remedy}")
    return lines


if __name__ == "__main__":
    _measure(Path(sys.argv[1]))
