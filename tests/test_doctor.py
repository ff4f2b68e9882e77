from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hf_mae import doctor
from hf_mae.cli import main
from hf_mae.doctor import Case, Outcome, check_training, describe_machine, examine, make_cases


def judge(case: Case, gpus: int = 0, **fields):
    reference = Outcome(Case(name="float32"), losses=[1.0, 0.9, 0.8], images_per_second=100.0, digests={"w": "a"})
    outcomes = {"float32": reference, case.name: Outcome(case, **{"losses": [1.0, 0.9, 0.8], **fields})}
    return doctor._judge(outcomes[case.name], outcomes, gpus)


def test_says_what_is_there_and_what_it_costs_to_lack(tmp_path, monkeypatch, capsys):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "cv2" else real(name))
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_token")
    out = tmp_path / "report.json"
    main(["doctor", "--out", str(out)])
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert f"torch {torch.__version__.split('+')[0]}" in shown
    assert "pip install 'hf_mae[birds]'" in shown
    assert record["missing_extras"] == {"birds": ["cv2"]}
    assert record["cpu_threads"] == torch.get_num_threads()
    assert record["allowed_cpus"] >= 1
    assert "hf_a_secret_token" not in shown + out.read_text()
    main(["doctor", "--out", str(out)])  # its own report is replaced


def test_does_not_replace_what_is_not_a_report(tmp_path, capsys):
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--out", str(out)])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err
    assert out.read_text() == '{"mine": 1}'
    with pytest.raises(ValueError, match="--out"):
        examine(tmp_path / "nowhere" / "report.json")


def test_names_gpus(monkeypatch, tmp_path):
    facts = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    rows, record = describe_machine(tmp_path)
    assert [gpu["name"] for gpu in record["gpus"]] == ["NVIDIA H100"] * 2
    assert record["gpus"][0]["memory_gib"] == 80
    row = next(row for row in rows if row.name == "GPU 1")
    assert "fp16" in row.remedy  # without bfloat16 units


def test_cases_fit_the_machine():
    names = [case.name for case in make_cases(8)]
    assert {"ddp", "fsdp2", "fsdp2-bf16", "deterministic-resume"} <= set(names)
    assert [c.processes for c in make_cases(1) if c.processes > 1] == []
    assert not any("fsdp" in case.name for case in make_cases(0))
    for case in make_cases(8):
        recipe = doctor.make_recipe(case, doctor.Path("images"), doctor.Path("out"), 8, None)
        assert recipe.global_batch % case.processes == 0
        assert recipe.engine.expect_processes == case.processes
        assert recipe.engine.deterministic == case.deterministic


def test_what_is_wrong_is_called_failed():
    assert judge(Case(name="bf16", precision="bf16"), losses=[1.001, 0.9, 0.8]).status == "ok"
    assert judge(Case(name="bf16", precision="bf16"), losses=[1.1, 0.9, 0.8]).status == "failed"
    assert judge(Case(name="DDP", processes=2), losses=[1.001, 0.9, 0.8]).status == "failed"
    assert judge(Case(name="DDP", processes=2), losses=[1.0, float("nan"), 0.8]).status == "failed"
    assert judge(Case(name="DDP", processes=2), losses=[]).status == "failed"
    assert judge(Case(name="DDP", processes=2), error="RuntimeError: out of memory").status == "failed"
    assert judge(Case(name="DDP", processes=2), error="skipped: the time is over").status == "skipped"


def test_other_bits_after_a_stop_are_a_failure_where_bits_are_promised():
    case, exact = Case(name="resume", resume_from="float32"), Case(name="r", resume_from="float32", deterministic=True)
    assert judge(case, digests={"w": "a"}).status == "ok"
    assert judge(case, digests={"w": "b"}).status == "failed"  # a CPU
    assert judge(case, gpus=1, digests={"w": "b"}).status == "note"
    assert judge(exact, gpus=1, digests={"w": "b"}).status == "failed"


def test_slow_decoding_is_told():
    case = Case(name="decoding", decode_only=True)
    assert judge(case, losses=[], images_per_second=500.0).status == "ok"
    slow = judge(case, losses=[], images_per_second=50.0)
    assert slow.status == "note"
    assert "--num-workers" in slow.remedy


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="float32"):
        check_training(0, only=["float64"])


def test_parts_without_the_training_check_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--train"):
        examine(tmp_path / "report.json", only=("bf16",))
    assert not (tmp_path / "report.json").exists()


def test_what_does_not_fit_the_time_is_left_out():
    rows, _ = check_training(0, minutes=0.1)
    assert {row.status for row in rows} == {"skipped"}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_trains_resumes_and_decodes_on_this_machine(tmp_path):
    out = tmp_path / "report.json"
    lines: list[str] = []
    only = ("bf16", "resume", "ddp", "decoding")
    assert examine(out, train=True, only=only, say=lines.append), "\n".join(lines)
    cases = {case["case"]["name"]: case for case in json.loads(out.read_text())["training"]}
    assert set(cases) == {*only, "float32"}
    assert cases["resume"]["digests"] == cases["float32"]["digests"] != {}
    assert cases["float32"]["losses"][-1] < cases["float32"]["losses"][0]
    assert all(case["images_per_second"] > 0 for case in cases.values())


@pytest.mark.slow
def test_a_part_that_fails_says_why_and_the_others_go_on(monkeypatch, tmp_path):
    broken = Case(name="broken", environment={"WORLD_SIZE": "3", "RANK": "0"})
    monkeypatch.setattr(doctor, "make_cases", lambda gpus: [broken, Case(name="decoding", decode_only=True)])
    lines: list[str] = []
    assert not examine(tmp_path / "report.json", train=True, say=lines.append)
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["broken"]["status"] == "failed"
    assert rows["broken"]["value"]
    assert rows["decoding"]["status"] == "ok"
