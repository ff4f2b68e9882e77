"""The arithmetic of `hf-mae plan`, held to the real model, to transformers' model and to what others publish."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_mae.data.loader import steps_per_epoch
from hf_mae.data.rows import DigitsSource
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.masking import count_kept
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.planning.counts import BlockShape, activation_bytes, count_flops, count_parameters, shapes
from hf_mae.planning.hardware import GPUS, HAND_OVER, IMAGES, Hardware
from hf_mae.planning.plan import RESERVE, as_dict, make_run_plan
from hf_mae.planning.published import PUBLISHED, PUBLISHED_MEMORY
from hf_mae.planning.report import published_report, report
from hf_mae.recipes.base import VIT_SIZES, Model
from hf_mae.recipes.checks import choose_micro_batch, largest_divisor
from hf_mae.recipes.mae import PRESETS
from hf_mae.training.schedules import make_plan

TINY = Model(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
)
VARIANTS = {
    "plain": TINY,
    "patch 4": replace(TINY, patch_size=4),
    "half masked": replace(TINY, mask_ratio=0.5),
    "decoder of one block": replace(TINY, decoder_num_hidden_layers=1),
    "decoder of three blocks": replace(TINY, decoder_num_hidden_layers=3),
    "mask tokens in the encoder": replace(TINY, mask_tokens_in_encoder=True),
    "grey, oblong, learned positions": replace(
        TINY, image_size=(16, 32), num_channels=1, pos_embed="learned", intermediate_size=40
    ),
}
RECIPE = PRESETS["mae-vit-b-800ep"]
each_variant = pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())


def build(model: Model, attention: str = "sdpa", device: str = "cpu") -> MAEForPreTraining:
    with torch.device(device):
        built = MAEForPreTraining(MAEConfig(**asdict(model)))
    built.set_attn_implementation(attention)
    return built.train()


def inputs(config: MAEConfig, batch: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    (rows, cols), patch = config.grid, config.patch_size
    pixel_values = torch.zeros(batch, config.num_channels, rows * patch, cols * patch, device=device)
    return pixel_values, torch.rand(batch, config.num_patches, device=device)


def counted(model, pixel_values, noise) -> tuple[int, int]:
    """FLOPs of forward and backward by torch's counter, per image. Eager attention, which it can see on any device."""
    with FlopCounterMode(display=False) as forward:
        loss = model(pixel_values, noise=noise).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() // len(pixel_values), backward.get_total_flops() // len(pixel_values)


# ------------------------------------------------------------------------------------------------ counts


@each_variant
def test_flops_are_those_that_torch_counts(model):
    real = build(model, "eager")
    flops = count_flops(model)
    assert counted(real, *inputs(real.config, 2)) == (flops.forward, flops.backward)


@pytest.mark.parametrize("size", ["b", "h"])
def test_flops_of_the_papers_models_are_those_that_torch_counts(size):
    model = Model(**VIT_SIZES[size])
    real = build(model, "eager", "meta")
    flops = count_flops(model)
    assert counted(real, *inputs(real.config, 1, "meta")) == (flops.forward, flops.backward)


def test_flops_without_shortcuts_are_those_of_transformers_model():
    """Its order is the official one: all patches embedded, all tokens through the last block and the head."""
    with torch.device("meta"):
        real = ViTMAEForPreTraining._from_config(ViTMAEConfig(), attn_implementation="eager").train()
    flops = count_flops(Model(), shortcuts=False)
    found = counted(real, torch.zeros(1, 3, 224, 224, device="meta"), torch.rand(1, 196, device="meta"))
    assert found == (flops.forward, flops.backward)


def test_flops_of_a_block_by_hand():
    # 3 tokens, 2 computed, width 4, MLP 5: qkv 3x4x12, scores and values 2x3x4 each, projection 2x4x4, MLP 2x2x4x5.
    block = BlockShape(tokens=3, outputs=2, width=4, hidden=5, heads=2)
    assert block.flops == 2 * (3 * 4 * 12 + 2 * (2 * 3 * 4) + 2 * 4 * 4 + 2 * (2 * 4 * 5))


def test_flops_are_those_of_the_literature():
    """Giga-FLOPs a step of ViT-B, L and H as counted beside the first prototype."""
    found = [count_flops(Model(**VIT_SIZES[size]), shortcuts=False).step / 1e9 for size in "blh"]
    assert found == pytest.approx([58.5, 124, 291], rel=5e-3)


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS.keys())
def test_parameters_are_those_of_the_model(recipe):
    real, found = build(recipe.model, device="meta"), count_parameters(recipe.model)
    encoder = sum(p.numel() for name, p in real.named_parameters() if "decoder" not in name and name != "mask_token")
    assert found.encoder == encoder
    assert found.trained == sum(p.numel() for p in real.parameters())
    assert found.tables == sum(b.numel() for b in real.buffers())


@each_variant
def test_parameters_of_variants_are_those_of_the_model(model):
    real, found = build(model), count_parameters(model)
    assert found.trained == sum(p.numel() for p in real.parameters())
    assert found.tables == sum(b.numel() for b in real.buffers())


def test_kept_patches_are_truncated_as_in_the_model():
    for ratio in (0.1, 0.5, 0.6, 0.75, 0.9):
        for side in (5, 10, 14):
            model = replace(TINY, image_size=side * 8, mask_ratio=ratio)
            assert shapes(model).kept == count_kept(side * side, ratio)


def saved_bytes(model: MAEForPreTraining, batch: int, autocast: bool) -> int:
    """Bytes of the distinct storages that autograd keeps, weights and tables not counted."""
    skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage
        return tensor

    pixel_values, noise = inputs(model.config, batch)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss = model(pixel_values, noise=noise).loss
    total = sum(storage.nbytes() for storage in seen.values())
    assert loss.requires_grad
    return total


@each_variant
@pytest.mark.parametrize(
    ("precision", "attention", "checkpoint"),
    [
        ("no", "sdpa", "none"),
        ("no", "eager", "none"),
        ("no", "sdpa", "gelu"),
        ("no", "sdpa", "blocks"),
        ("bf16", "sdpa", "none"),
        ("bf16", "sdpa", "gelu"),
        ("bf16", "sdpa", "blocks"),
        # Not eager under bf16: GPUs run its softmax in float32 and keep both, CPUs keep one in bf16.
    ],
)
def test_activations_are_what_autograd_saves(model, precision, attention, checkpoint):
    real = build(model, attention)
    real.checkpoint_activations(checkpoint)
    autocast = precision == "bf16"
    # The difference of two batches: copies of weights that autocast saves do not grow with the batch.
    per_image = (saved_bytes(real, 6, autocast) - saved_bytes(real, 2, autocast)) / 4
    found = activation_bytes(model, precision, attention, checkpoint=checkpoint)
    assert found == pytest.approx(per_image, rel=0.02)  # equal to the byte when this was written


def test_checkpointing_keeps_less_and_eager_attention_more():
    model = Model()
    assert activation_bytes(model, "bf16", checkpoint="blocks") < 0.2 * activation_bytes(model, "bf16")
    assert activation_bytes(model, "bf16", "eager") > 1.3 * activation_bytes(model, "bf16")
    assert activation_bytes(model, "no") > 1.7 * activation_bytes(model, "bf16")


# ------------------------------------------------------------------------------------------------ the plan


def test_updates_are_those_of_the_run():
    for recipe, rows in (
        (RECIPE, 1_281_167),
        (replace(PRESETS["mae-vit-b"], epochs=50.0), 7_001),
        (replace(PRESETS["quickstart"], max_steps=77), 1_437),
    ):
        plan = make_run_plan(recipe, Hardware(gpus=8, images=rows))
        per_epoch = steps_per_epoch(rows, recipe.global_batch, recipe.data.remainder)
        assert plan.updates == make_plan(recipe, steps_per_epoch=per_epoch).total_steps
        assert plan.images_seen == plan.updates * recipe.global_batch


def test_repeats_lengthen_an_epoch_and_spare_the_disk():
    twice = replace(RECIPE, data=replace(RECIPE.data, repeats=2))
    once, plan = make_run_plan(RECIPE, Hardware()), make_run_plan(twice, Hardware())
    assert plan.updates == pytest.approx(2 * once.updates, rel=0.01)
    assert plan.rate.read_megabytes_per_second == pytest.approx(once.rate.read_megabytes_per_second / 2)


def test_sizes_of_named_data_are_theirs():
    assert IMAGES["digits"] == int(DigitsSource("train", use_labels=False).sizes.sum())
    assert make_run_plan(PRESETS["mae-vit-t-cifar10"], Hardware()).images == 50_000
    assert make_run_plan(PRESETS["mae-vit-b"], Hardware()).images == 1_281_167


def test_micro_batch_is_what_the_run_would_choose():
    for gpus in (1, 8, 64):
        for batch in (192, 1024, 4096):
            recipe = replace(RECIPE, global_batch=batch)
            plan = make_run_plan(recipe, Hardware(gpus=gpus))
            assert plan.micro_batch == choose_micro_batch(recipe, gpus)
            assert plan.micro_batch * plan.accumulation * gpus == batch


def test_auto_takes_the_largest_micro_batch_that_fits():
    plan = make_run_plan(replace(RECIPE, micro_batch="auto"), Hardware(gpu="v100", gpus=8))
    assert plan.micro_batch == plan.memory[0].largest_even > 64
    assert plan.memory[0].total <= 16e9 * (1 - RESERVE)


@pytest.mark.parametrize("precision", ["best", "recipe"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(precision):
    plan = make_run_plan(RECIPE, Hardware(gpu="v100", gpus=16, precision=precision))
    for memory in plan.memory:
        per_image = memory.activations_per_image + memory.working_per_image
        assert memory.fixed + memory.largest * per_image <= 16e9 * (1 - RESERVE)
        assert memory.fixed + (memory.largest + 1) * per_image > 16e9 * (1 - RESERVE)
        assert memory.largest_even == largest_divisor(plan.images_per_gpu, memory.largest)


def test_state_is_sixteen_bytes_a_parameter_and_fsdp_divides_it():
    plan = make_run_plan(RECIPE, Hardware(gpus=16))
    state = [memory.weights + memory.gradients + memory.optimizer for memory in plan.memory]
    assert state == pytest.approx([16 * plan.parameters.trained] * 3 + [plan.parameters.trained] * 3)
    average = replace(RECIPE, optim=replace(RECIPE.optim, ema_decay=0.999))
    assert make_run_plan(average, Hardware()).memory[0].optimizer == 12 * plan.parameters.trained


def test_hours_follow_from_rate_and_images():
    plan = make_run_plan(RECIPE, Hardware(gpu="a100", gpus=8, mfu=0.4))
    per_gpu = 0.4 * 312e12 / count_flops(RECIPE.model).step
    assert plan.rate.images_per_second_per_gpu == pytest.approx(per_gpu)
    assert plan.rate.hours == pytest.approx(plan.images_seen / (8 * per_gpu) / 3600)
    assert plan.rate.gpu_hours == pytest.approx(8 * plan.rate.hours)
    assert [rate.mfu for rate in plan.rates] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert plan.rates[1].hours == pytest.approx(2 * plan.rates[3].hours)


def test_checkpointing_costs_up_to_one_more_forward_pass():
    recipe = replace(RECIPE, engine=replace(RECIPE.engine, checkpoint_activations="blocks"))
    ratio = make_run_plan(recipe, Hardware()).rate.hours / make_run_plan(RECIPE, Hardware()).rate.hours
    assert 1.3 < ratio <= 4 / 3 + 0.01


def test_few_workers_are_named_as_the_limit():
    few, many = (make_run_plan(replace(RECIPE, num_workers=n), Hardware(decode_rate=100.0)) for n in (2, 64))
    core = 100 / (1 + HAND_OVER["thread"])
    assert few.workers_feed == pytest.approx(2 * core)
    assert few.hours_as_fed == pytest.approx(few.images_seen / (2 * core * 8) / 3600)
    assert many.hours_as_fed == many.rate.hours
    assert few.rate.cores == pytest.approx(few.rate.images_per_second / core)
    none = make_run_plan(replace(RECIPE, num_workers=0), Hardware(decode_rate=100.0))
    assert none.hours_as_fed == pytest.approx(none.rate.hours + none.images_seen / (100 * 8) / 3600)


def test_checkpoint_sizes_are_those_of_the_tensors():
    recipe = replace(RECIPE, model=TINY)
    plan, real = make_run_plan(recipe, Hardware(gpus=1)), build(TINY)
    assert plan.checkpoint_weights == sum(t.numel() * 4 for t in real.state_dict().values())
    assert plan.checkpoint_optimizer == sum(2 * p.numel() * 4 for p in real.parameters())


def test_gradients_go_round_a_ring():
    """Each rank sends (n - 1) / n of the gradients twice: once to add them up, once to hand the sums round."""
    alone, two = make_run_plan(RECIPE, Hardware(gpus=1)), make_run_plan(RECIPE, Hardware(gpus=2))
    assert (alone.gradient_traffic, two.gradient_traffic) == (0, 4 * two.parameters.trained)


def test_precision_is_the_recipes_when_it_names_one():
    def planned(gpu, precision="best", **engine):
        recipe = replace(RECIPE, engine=replace(RECIPE.engine, **engine))
        plan = make_run_plan(recipe, Hardware(gpu=gpu, precision=precision))
        return plan.precision, plan.peak_tflops

    assert planned("a100") == ("bf16", 312)
    assert planned("v100") == ("fp16", 125)
    assert planned("a100", precision="recipe") == ("no", 19.5)
    assert planned("a100", tf32=True) == ("tf32", 156)


def test_a_processor_can_be_described():
    plan = make_run_plan(RECIPE, Hardware(tflops=0.15, gpus=1, gpu_memory=24))
    assert (plan.gpu, plan.precision, plan.peak_tflops, plan.memory_gb) == ("custom", "no", 0.15, 24)
    unknown = make_run_plan(RECIPE, Hardware(tflops=0.15, gpus=1))
    assert unknown.memory[0].largest is None
    assert make_run_plan(RECIPE, Hardware(gpu="a100", gpu_memory=80)).memory_gb == 80


@pytest.mark.parametrize(
    ("recipe", "hardware", "message"),
    [
        ({}, {"gpu": "a10000"}, r"--gpu a10000 is unknown; use one of t4, v100, .*, or describe it: --tflops"),
        ({}, {"mfu": 40.0}, r"--mfu 40.0 must lie in 0 .. 1: it is a share of the peak, such as 0.3"),
        ({}, {"gpus": 0}, r"--gpus 0 must be above 0"),
        ({}, {"tflops": -1.0}, r"--tflops -1.0 must be above 0 and finite"),
        ({}, {"decode_rate": float("nan")}, r"--decode-rate nan must be above 0"),
        ({}, {"gpus": 48}, r"global_batch=4096 is not divisible by 48 processes; use 4080 or 4128"),
        ({"micro_batch": 100}, {}, r"micro_batch=100 does not divide the 512 images .*; use 64"),
        ({"model": replace(TINY, image_size=30)}, {}, r"image_size=30 is not a multiple of model.patch_size=8"),
        ({"model": replace(TINY, mask_ratio=0.99)}, {}, r"mask_ratio=0.99 keeps none of 16 patches"),
        ({"model": replace(TINY, hidden_size=30)}, {}, r"hidden_size=30 is not a multiple of .*num_attention_heads=4"),
        ({"engine": replace(RECIPE.engine, precision="bf16")}, {"gpu": "v100"}, r"use --engine.precision fp16"),
        ({"seed": -1}, {}, r"seed=-1 must lie in"),
    ],
)
def test_mistakes_are_refused_with_a_remedy(recipe, hardware, message):
    with pytest.raises(ValueError, match=message):
        make_run_plan(replace(RECIPE, **recipe), Hardware(**hardware))


# ------------------------------------------------------------------------------------------------ published runs


def test_published_runs_imply_these_shares_of_the_peak():
    """Arithmetic on what others report: no claim about what this package reaches."""
    found = {run.gpu: run.mfu for run in PUBLISHED}
    assert found == pytest.approx({"v100": 0.105, "a100": 0.370, "a6000": 0.118, "rtx4090": 0.108}, abs=0.002)
    assert all(run.gpu in GPUS for run in PUBLISHED)


def test_a_published_time_comes_back_at_its_own_mfu():
    """42 h for ViT-L on 64 V100, but for the exact shortcuts, which that run did without."""
    run = next(run for run in PUBLISHED if run.gpu == "v100")
    hours = make_run_plan(PRESETS["mae-vit-l-800ep"], Hardware(gpu="v100", gpus=64, mfu=run.mfu)).rate.hours
    assert hours == pytest.approx(42, rel=0.02)
    assert hours < 42


def test_planned_memory_is_within_a_half_of_the_one_published():
    _, planned, reported = PUBLISHED_MEMORY
    assert 0.5 < planned / reported < 1.5


# ------------------------------------------------------------------------------------------------ the report


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS.keys())
def test_every_preset_has_a_report_with_all_assumptions(recipe):
    plan = make_run_plan(recipe, Hardware())
    text = report(recipe, plan)
    assert max(map(len, text.splitlines())) <= 125
    assumptions = text.partition("\nAssumptions\n")[2]
    for name, value, source in plan.assumptions:
        line = next(line for line in assumptions.splitlines() if line.startswith(f"  {name}  "))
        assert value in line
        assert source.split()[0] in line
    assert "nan" not in text
    assert json.loads(json.dumps(as_dict(plan)))["flops"]["step"] == count_flops(recipe.model).step


def test_a_run_bound_by_kernel_starts_is_called_one():
    assert "WARNING" in report(PRESETS["quickstart"], make_run_plan(PRESETS["quickstart"], Hardware()))
    assert "WARNING" not in report(RECIPE, make_run_plan(RECIPE, Hardware()))


def test_a_model_too_large_for_the_gpu_is_said_not_to_fit():
    recipe = replace(PRESETS["mae-vit-h-1600ep"], micro_batch=64)
    text = report(recipe, make_run_plan(recipe, Hardware(gpu="t4", gpu_memory=8)))
    assert " NO " in text
    assert make_run_plan(recipe, Hardware(gpu="t4", gpu_memory=8)).memory[0].largest_even == 0


def test_published_report_names_every_source():
    text = " ".join(published_report().split())
    for run in PUBLISHED:
        assert run.source in text
        assert f"{run.mfu:.1%}" in text
        assert run.note in text
