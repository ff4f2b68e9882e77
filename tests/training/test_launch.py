"""What `accelerate config` and launchers can ask for: it works as in scripts/configs, or is refused at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file

from hf_mae.recipes.base import Engine, Recipe, changed_fields, from_dict, to_dict
from hf_mae.training import distributed

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "scripts" / "configs"
SCRIPT = Path(__file__).parent / "fsdp_on_cpu.py"
RUN = [
    "pretrain", "quickstart", "--max-steps", "6", "--global-batch", "32", "--micro-batch", "16", "--log-every", "2",
    "--evals.no-knn", "--evals.no-rankme", "--evals.no-probe", "--evals.pictures", "0",
]  # fmt: skip


def start(command, out, *flags):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "SLURM_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command, *RUN, "--out", str(out), *flags],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes):
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)[-4000:]
    return "\n".join(said)


def launch(config, out, *flags, options=()):
    command = ["-m", "accelerate.commands.launch", "--config_file", str(config), *options, str(SCRIPT)]
    return start(command, out, *flags)


def weights(out):
    return load_file(out / "checkpoints" / "step_00000006" / "model" / "model.safetensors")


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process without a launcher, in float32 and in bfloat16: what every other way of starting has to equal."""
    folder = tmp_path_factory.mktemp("alone")
    for precision in ("no", "bf16"):
        finish(start(["-m", "hf_mae.cli"], folder / precision, "--engine.precision", precision))
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["gpu", "multi_gpu", "cpu", "fsdp2", "fsdp2_bf16", "fsdp2_default"])
def test_a_config_of_accelerate_trains_what_one_process_trains(alone, tmp_path, name):
    config, options, flags = CONFIGS / f"{name}.yaml", ["--num_processes", "2"], []
    if name in ("gpu", "cpu"):
        options = []
    if name == "fsdp2_default":  # every question of `accelerate config` about FSDP answered by the enter key
        values = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
        values["fsdp_config"] |= {"fsdp_cpu_ram_efficient_loading": True, "fsdp_transformer_layer_cls_to_wrap": ""}
        config = tmp_path / "default.yaml"
        config.write_text(yaml.safe_dump(values))
    if name == "fsdp2_bf16":
        flags = ["--engine.precision", "bf16"]
    out = tmp_path / "run"
    said = finish(launch(config, out, *flags, options=options))
    kind = {"gpu": "1 process (NO)", "multi_gpu": "2 processes (MULTI_CPU)", "cpu": "2 processes (MULTI_CPU)"}
    assert kind.get(name, "2 processes (FSDP2)") in said
    expected = alone / ("bf16" if flags else "no")
    # A first update by AdamW is the sign of a gradient: where that is next to nothing, rounding decides.
    tolerance = 0.0 if name in kind else 2e-3 if flags else 1e-4
    mine, theirs = weights(out), weights(expected)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, atol=tolerance, rtol=0.0)
    assert losses(out) == pytest.approx(losses(expected), rel=1e-3 if flags else 1e-6)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp2_with_bf16_rounds_nothing_that_is_float32_without_it(tmp_path):
    """Masks, losses, mixing shares, draws of drop path and evaluation scores, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | FSDP | {"OMP_NUM_THREADS": "1", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    script = Path(__file__).parent / "fsdp_bf16.py"
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sharded"]
    assert found["masks"] == 4000
    assert found["different_masks"] == 0
    assert set(found["dtypes"].values()) == {"torch.float32"}, found["dtypes"]
    assert found["dtypes"].keys() >= {"noise", "mix_lam", "drop_path_noise", "loss", "score", "gradient"}
    assert found["loss"] == pytest.approx(found["loss_alone"], rel=1e-5)
    assert found["score_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_machines_train_what_one_process_trains(alone, tmp_path):
    where = ["--num_processes", "2", "--main_process_ip", "localhost", "--main_process_port", "29731"]
    ranks = [
        launch(CONFIGS / "multi_node.yaml", tmp_path / "run", options=[*where, "--machine_rank", str(rank)])
        for rank in (0, 1)
    ]
    assert "2 processes (MULTI_CPU)" in finish(*ranks)
    for key, value in weights(alone / "no").items():
        assert torch.equal(weights(tmp_path / "run")[key], value)


def two_nodes(folder, *flags, port):
    """What two agents of torchrun on loopback say, each started in a folder of its own."""
    nodes = []
    for rank in (0, 1):
        (folder / f"node{rank}").mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
            str(rank), "--rdzv_backend", "static", "--master_addr", "localhost", "--master_port", str(port),
            str(ROOT / "scripts" / "pretrain.py"), *RUN[1:], *flags,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        nodes.append(
            subprocess.Popen(
                command, cwd=folder / f"node{rank}", env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    return [node.communicate(timeout=180)[0] for node in nodes]


def error_in(text):
    return next((line for line in text.splitlines() if line.startswith("hf-mae: error")), text)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_nodes_that_see_different_run_folders_are_refused_with_host_and_path(tmp_path):
    """A relative --out is another folder on each."""
    for text in two_nodes(tmp_path, "--out", "run", port=29741):
        error = error_in(text)
        assert "out=run" in error
        assert f"{tmp_path}/node1/run on {os.uname().nodename}" in error
        assert "--out" in error.split(";")[1]
        assert "free some space" not in text
    assert not list(tmp_path.glob("node0/run/.shared_*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_data_that_one_node_lacks_end_the_run_on_all(tmp_path):
    """Not after half an hour of waiting for the one that ended."""
    (tmp_path / "node0" / "images").mkdir(parents=True)
    for number in range(40):
        Image.new("L", (8, 8), number).save(tmp_path / "node0" / "images" / f"{number}.png")
    began = time.monotonic()
    first, second = two_nodes(tmp_path, "--data.path", "images", "--out", str(tmp_path / "run"), port=29751)
    assert "rank 1 failed while opening data.path=images" in error_in(first)
    assert "data.path='images'" in error_in(second)
    assert time.monotonic() - began < 120


def test_every_config_is_tested_and_names_fields_that_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"gpu", "multi_gpu", "multi_node", "cpu", "fsdp2", "fsdp2_bf16"}
    for name in names:
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses a field that it does not know
        assert not any(config.fsdp_config.get(f"fsdp_{x}") for x in ("offload_params", "activation_checkpointing"))


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "engine", "field", "remedy"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed", "fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron", "fsdp2.yaml"),
        (FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism", "fsdp2.yaml"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP version 1", "--fsdp_version 2"),
        (FSDP | {"FSDP_VERSION": "1"}, {}, "FSDP version 1", "--fsdp_version 2"),
        (FSDP, {"precision": "fp16"}, "engine.precision=fp16", "--engine.precision bf16"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params=true", "--engine.checkpoint-activations"),
        (
            FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp_activation_checkpointing=true",
            "--engine.checkpoint-activations",
        ),
        ({}, {"precision": "fp16"}, "engine.precision=fp16", "--engine.precision bf16"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_remedy(monkeypatch, environment, engine, field, remedy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=field) as raised:
        distributed.make_accelerator(Engine(**engine))
    assert remedy in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_class_to_wrap_that_is_not_there_is_refused(monkeypatch, toy):
    accelerator = distributed.make_accelerator(Engine())
    plugin = type("Plugin", (), {"transformer_cls_names_to_wrap": ["ViTLayer"]})()
    monkeypatch.setitem(type(accelerator.state)._shared_state, "fsdp_plugin", plugin)
    with pytest.raises(ValueError, match=r"fsdp_transformer_layer_cls_to_wrap=ViTLayer.*leave it empty"):
        distributed.prepare(accelerator, *toy.build())


def test_settings_of_the_launcher_neither_scale_the_loss_nor_compile(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = distributed.make_accelerator(Engine())
    weight = torch.ones((), requires_grad=True)
    accelerator.backward(weight * 3)
    assert weight.grad == 3
    assert not hasattr(accelerator.prepare_model(torch.nn.Linear(2, 2)), "_orig_mod")
    assert "--engine.compile" in distributed.describe_world(accelerator)


def test_fsdp_that_one_process_cannot_use_is_said(monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    said = distributed.describe_world(distributed.make_accelerator(Engine()))
    assert "FSDP of `accelerate config` is not used" in said
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"


def srun(**values):
    return {f"SLURM_{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    "environment",
    [
        srun(NTASKS="8", STEP_NUM_TASKS="8", PROCID="3"),
        srun(STEP_NUM_TASKS="2", PROCID="0"),
        srun(NTASKS="8", PROCID="0"),  # a batch script, and what older versions set
    ],
)
def test_tasks_of_slurm_without_a_launcher_are_refused(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"SLURM_.*TASKS=") as raised:
        distributed.make_accelerator(Engine())
    assert "torchrun" in str(raised.value)
    monkeypatch.setenv("WORLD_SIZE", "1")  # the way out for independent runs
    assert distributed.make_accelerator(Engine()).num_processes == 1


def test_one_process_in_a_step_of_its_own_starts(monkeypatch):
    for name, value in srun(NTASKS="4", STEP_NUM_TASKS="1", PROCID="0").items():
        monkeypatch.setenv(name, value)
    assert distributed.make_accelerator(Engine()).num_processes == 1


def test_processes_of_mpi_that_accelerate_did_not_join_are_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setattr(distributed, "Accelerator", lambda **kwargs: type("Alone", (), {"num_processes": 1})())
    with pytest.raises(RuntimeError, match=r"OMPI_COMM_WORLD_SIZE=4 process\(es\) but Accelerate uses 1"):
        distributed.make_accelerator(Engine())


class Gpu:
    """As much of an Accelerator on a GPU as `describe_world` asks for."""

    num_processes, mixed_precision, is_fsdp2 = 1, "bf16", False
    distributed_type, device = DistributedType.NO, torch.device("cuda", 0)


@pytest.mark.parametrize(("local", "idle"), [(None, "1 of 8 GPUs used"), ("4", "4 of 8 GPUs used"), ("8", None)])
def test_idle_gpus_are_said_and_the_model_is_named(monkeypatch, local, idle):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    said = distributed.describe_world(Gpu())
    assert "NVIDIA H100" in said
    assert (idle is None) == ("GPUs used" not in said)
    assert idle is None or idle in said


@pytest.fixture
def determinism():
    """What torch's switches were is put back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic = before[1]
    torch.utils.deterministic.fill_uninitialized_memory = filled
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("determinism")
def test_deterministic_sets_the_switches_of_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    distributed.make_accelerator(Engine())
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    distributed.make_accelerator(Engine(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG"):
        distributed.make_accelerator(Engine(deterministic=True))


@pytest.mark.usefixtures("determinism")
def test_what_has_no_deterministic_kernel_is_refused_in_one_sentence():
    def without_kernel():
        return torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))

    with distributed.refuse_nondeterministic():
        without_kernel()
    distributed.make_accelerator(Engine(deterministic=True))
    with (
        pytest.raises(ValueError, match=r"engine\.deterministic=True: put_") as raised,
        distributed.refuse_nondeterministic(),
    ):
        without_kernel()
    assert "--engine.deterministic" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="another"), distributed.refuse_nondeterministic():
        raise RuntimeError("another")


def test_a_run_begun_before_there_was_deterministic_goes_on(toy):
    saved = to_dict(toy.recipe)
    del saved["engine"]["deterministic"]
    now = replace(toy.recipe, engine=replace(toy.recipe.engine, deterministic=True))
    assert changed_fields(from_dict(saved, Recipe), toy.recipe) == {}
    assert changed_fields(from_dict(saved, Recipe), now) == {}  # nothing of what is learned
