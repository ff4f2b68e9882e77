"""The tables of a card: how it was trained, on what, how pictures are prepared, how exact the export is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_mae.cards.facts import NOT_MEASURED, Fact, Style, fact, maybe
from hf_mae.cards.private import published
from hf_mae.cards.records import Records
from hf_mae.recipes.fields import choose

Row = tuple[str, "Fact | str"]

RECIPE, METRICS_FILE, ENVIRONMENT, EXPORT = "recipe.json", "metrics.jsonl", "environment.json", "export.json"

_TRAINING: tuple[tuple[str, str, Style], ...] = (
    ("optimizer", "optim.name", "plain"),
    ("base learning rate (of 256 images)", "optim.base_lr", "plain"),
    ("schedule", "schedule.name", "plain"),
    ("warm-up, epochs", "schedule.warmup_epochs", "plain"),
    ("last learning rate of the schedule", "schedule.min_lr", "plain"),
    ("weight decay", "optim.weight_decay", "plain"),
    ("betas", "optim.betas", "plain"),
    ("layer decay", "optim.layer_decay", "plain"),
    ("gradient clipping", "optim.clip_grad", "plain"),
    ("moving average of the weights", "optim.ema_decay", "plain"),
    ("images in a batch", "global_batch", "count"),
    ("seed", "seed", "plain"),
    ("mask ratio", "model.mask_ratio", "plain"),
    ("masking", "model.mask_strategy", "plain"),
    ("prediction target", "model.target", "plain"),
    ("normalised target patches", "model.norm_pix_loss", "plain"),
    ("drop path", "model.drop_path_rate", "plain"),
    ("dropout", "model.drop_rate", "plain"),
    ("trained blocks", "trainable_blocks", "plain"),
    ("loss", "loss.name", "plain"),
    ("label smoothing", "augment.label_smoothing", "plain"),
    ("mixup", "augment.mixup", "plain"),
    ("cutmix", "augment.cutmix", "plain"),
)
_OFF = (0, 0.0, False, "", [], ())
_SAID_WHEN_OFF = frozenset({"seed", "optim.weight_decay", "trainable_blocks", "model.norm_pix_loss"})


def training_table(records: Records) -> list[Row]:
    """Return the hyper-parameters: of the recipe what is on, and what was actually used from the metrics."""
    recipe, rows = records.recipe, records.rows
    if not recipe:
        return []
    table: list[Row] = [("recipe", fact(recipe, "name", RECIPE)), ("after", fact(recipe, "source", RECIPE))]
    rates = [row["lr"] for row in rows if row.get("lr") is not None]
    if rates:
        table.append(("highest learning rate used", Fact(max(rates), f"{METRICS_FILE}: largest lr", "short")))
    if rows:
        step = records.source.get("step")
        if step is not None and step != rows[-1]["step"]:
            table.append(("updates until these weights", Fact(step, f"{EXPORT}: source.step", "count")))
        table.append(("updates of the run", Fact(rows[-1]["step"], f"{METRICS_FILE}: last row, step", "count")))
        table.append(("epochs of the run", Fact(round(rows[-1]["epoch"], 2), f"{METRICS_FILE}: last row, epoch")))
        seen = Fact(rows[-1]["examples_seen"], f"{METRICS_FILE}: last row", "count")
        table.append(("samples seen by the run", seen))
    for label, path, style in _TRAINING:
        found = maybe(recipe, path, RECIPE, style)
        if found is not None and (path in _SAID_WHEN_OFF or (found.value not in _OFF and found.value != 1.0)):
            table.append((label, found))
    table.append(("augmentation", augmentation(recipe)))
    table.append(("precision", precision(recipe)))
    return table


def augmentation(recipe: Mapping[str, Any]) -> Fact | str:
    """Return what was done to training pictures, in words."""
    group = recipe.get("augment")
    if not group:
        return "not recorded"
    crop = str(group["crop"])
    words = [f"{crop} crop" if crop != "resize" else "whole picture resized"]
    if crop in ("random-resized", "clamped"):
        words[0] += f" (area {group['scale'][0]:g} to {group['scale'][1]:g})"
    words += [word for word, on in (("flip", group.get("flip")), ("vertical flip", group.get("vertical_flip"))) if on]
    if angles := group.get("rotate"):
        joined = (" + " if group.get("rotate_once") else ", then ").join(f"{a:g}" for a in angles)
        words.append(f"rotation by up to {joined} degrees")
    for name, word in (("color_jitter", "colour jitter"), ("auto_augment", "AutoAugment"), ("rand_augment", "")):
        if value := group.get(name):
            words.append(f"{word} {value}".strip())
    if erase := group.get("erase_prob"):
        words.append(f"random erasing of {100 * erase:g} % of the pictures")
    return Fact(", ".join(words), f"{RECIPE}: augment")


def precision(recipe: Mapping[str, Any]) -> Fact | str:
    """Return the number format of training."""
    found = maybe(recipe, "engine.precision", RECIPE)
    if found is None:
        return "not recorded"
    words = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
    return Fact(choose("engine.precision", str(found.value), words), found.source)


def hardware_table(records: Records) -> list[Row]:
    """Return what it ran on and how long it took; several starts are counted together."""
    starts, rows = records.starts, records.rows
    if not starts:
        return []
    last = starts[-1]
    where = f"{ENVIRONMENT}: last start"
    table: list[Row] = [
        (label, _distinct(starts, name))
        for label, name in (
            ("device", "device"),
            ("processes", "processes"),
            ("CPU cores", "cpus"),
            ("images per process and forward pass", "micro_batch"),
        )
    ]
    table += [
        ("first start", Fact(starts[0]["time"], f"{ENVIRONMENT}: first start, time")),
        ("starts", Fact(len(starts), f"{ENVIRONMENT}: starts", "count")),
    ]
    cached = bool(records.recipe.get("cached_features"))
    seconds, images = training_time(rows)
    if seconds and not cached:
        how = f"{METRICS_FILE}: sum over rows of new examples_seen / images_per_second"
        table.append(("time of the updates (without evaluations)", Fact(seconds, how, "seconds")))
        table.append(("images per second", Fact(images / seconds, f"{how}; all images by that time", "short")))
    else:
        table.append(("time of the updates", NOT_MEASURED + (" (the features were computed once)" if cached else "")))
    names = ("torch", "transformers", "timm", "accelerate", "hf_mae")
    versions = ", ".join(f"{n} {last['packages'][n]}" for n in names if n in last["packages"])
    table.append(("versions", Fact(f"Python {last['python']}, {versions}", f"{where}, packages")))
    return table


def _distinct(starts: Sequence[Mapping[str, Any]], name: str) -> Fact:
    """Return what the starts had, in order and each once: a run may go on on another machine."""
    found = list(dict.fromkeys(str(start[name]).partition(":")[0] for start in starts))
    return Fact(", then ".join(found), f"{ENVIRONMENT}: starts, {name}")


def training_time(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Return the seconds that the logged updates took, and the images in them."""
    seconds, images, before = 0.0, 0, 0
    for row in rows:
        if row.get("images_per_second"):
            new = row["examples_seen"] - before
            seconds, images, before = seconds + new / row["images_per_second"], images + new, row["examples_seen"]
    return seconds, images


def data_table(records: Records, name: str, dataset_id: str | None, licence: str | None) -> list[Row]:
    """Return what the weights were trained on, without a path of a machine."""
    if not records.recipe:
        return []
    data = records.starts[-1]["data"] if records.starts else {}
    where = f"{ENVIRONMENT}: last start, data"
    link = Fact(f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})", f"{RECIPE}: data.path", "markdown")
    table: list[Row] = [("data set", link if dataset_id else Fact(name, f"{RECIPE}: data.path"))]
    if not dataset_id:
        table.append(("where", "files of the author; not on the Hub under this name"))
    if data.get("rows") is not None:
        table.append(("images", Fact(data["rows"], f"{where}, rows", "count")))
    if data.get("revision") is not None:
        table.append(("revision", Fact(data["revision"], f"{where}, revision")))
    if data.get("classes"):
        table.append(("classes", Fact(len(data["classes"]), f"{where}, classes", "count")))
    if records.recipe["data"].get("splits"):
        rule = published(records.recipe["data"]["splits"], field="splits")
        table.append(("divided by", Fact(rule, f"{RECIPE}: data.splits")))
    bad = [row["bad_samples"] for row in records.rows if row.get("bad_samples") is not None]
    if bad:
        table.append(("unreadable images left out", Fact(bad[-1], f"{METRICS_FILE}: last bad_samples", "count")))
    table.append(("terms of the images", licence or "not stated; look them up before you build on these weights"))
    return table


_RESAMPLE = {"0": "nearest", "1": "Lanczos", "2": "bilinear", "3": "bicubic", "4": "box", "5": "Hamming"}
"""Names of PIL.Image.Resampling."""


def preprocessing_table(records: Records) -> list[Row]:
    """Return how a picture becomes an input."""
    p = records.preprocessing
    if "input_size" in p:  # timm's pretrained_cfg
        file = "config.json: pretrained_cfg"
        size = p.get("test_input_size") or p["input_size"]
        table: list[Row] = [
            ("input (channels, height, width)", Fact("x".join(map(str, size)), f"{file}.input_size")),
            ("part of the short side kept by the centre crop", fact(p, "crop_pct", file)),
            *([("resized", Fact("both sides, whatever the aspect", f"{file}.crop_mode"))] if is_squashed(p) else []),
            ("resampling", fact(p, "interpolation", file)),
        ]
        names = ("mean", "std")
    elif p:
        file = "preprocessor_config.json"
        table = []
        if (short := maybe(p, "size.shortest_edge", file)) is not None:
            table.append(("short side resized to, pixels", short))
        elif (height := maybe(p, "size.height", file)) is not None:
            sides = f"{height} x {fact(p, 'size.width', file)}"
            table.append(("resized to, pixels", Fact(sides, f"{file}: size")))
        if p.get("do_center_crop") and (crop := maybe(p, "crop_size.height", file)) is not None:
            sides = f"{crop} x {fact(p, 'crop_size.width', file)}"
            table.append(("centre crop, pixels", Fact(sides, f"{file}: crop_size")))
        resample = maybe(p, "resample", file)
        if resample is not None:
            table.append(("resampling", Fact(choose("resample", str(resample.value), _RESAMPLE), resample.source)))
        if p.get("do_convert_rgb") is not None:
            table.append(("converted to RGB", fact(p, "do_convert_rgb", file)))
        names = ("image_mean", "image_std")
    else:
        return []
    for name, label in zip(names, ("mean", "standard deviation"), strict=True):
        if (found := maybe(p, name, file)) is not None:
            table.append((label, Fact([round(float(v), 6) for v in found.value], found.source)))
    return table


def is_squashed(preprocessing: Mapping[str, Any]) -> bool:
    """Return whether both sides of an image are resized, whatever its aspect."""
    return preprocessing.get("crop_mode") == "squash" or "height" in preprocessing.get("size", {})


def exactness_table(records: Records) -> list[Row]:
    """Return how far the export is from the model it was made of, and its processor from the evaluation transform."""
    table: list[Row] = []
    parity = records.export.get("parity") or {}
    for name, label in (("float64", "largest difference, float64"), ("float32", "largest difference, float32")):
        found = maybe(parity, name, f"{EXPORT}: parity", "scientific")
        table.append((label, NOT_MEASURED if found is None else found))
    if (folding := maybe(parity, "folding", f"{EXPORT}: parity", "scientific")) is not None:
        table.append(("largest difference by folding (see below), float64", folding))
    if (what := maybe(parity, "what", f"{EXPORT}: parity")) is not None:
        table.insert(0, ("compared", what))
    if (images := maybe(parity, "images", f"{EXPORT}: parity")) is not None:
        table.append(("images compared", images))
    processor = records.export.get("processor") or {}
    moved = ", after laying the crops over each other" if _is_moved(processor) else ""
    for name, label in (
        ("pil", 'processor with backend="pil"'),
        ("default", "processor as loaded by default"),
        ("timm", "transform that timm makes of pretrained_cfg"),
    ):
        if (found := maybe(processor, name, f"{EXPORT}: processor", "short")) is not None:
            table.append((f"{label}, largest difference to our evaluation transform{moved}", found))
    if (images := maybe(processor, "images", f"{EXPORT}: processor")) is not None:
        table.append(("images prepared by the processor for that, of other sizes, aspects and modes", images))
    return table


def processor_words(records: Records) -> str:
    """Return how the image processor compares with the transform of our evaluation, as far as export.json says."""
    processor = records.export.get("processor") or {}
    agrees = processor.get("agrees")
    if agrees is None or records.export["library"] != "transformers":
        return ""
    if not agrees:
        return (
            "The image processor does not prepare pictures as our evaluation did (see the differences above), so "
            "accuracy may differ from what was measured."
        )
    white = (
        " Of a transparent picture it puts white behind it, where evaluation and pipelines drop the transparency: pass "
        '`image.convert("RGB")`.'
        if processor.get("transparency") == "white"
        else ""
    )
    return (
        '`AutoImageProcessor.from_pretrained(..., backend="pil")` prepares pictures as our evaluation does, but for '
        "up to one pixel of crop offset, as it rounds the place of the crop in its own way; the default backend "
        f"computes on tensors and rounds pixels differently too.{white}"
    )


def _is_moved(processor: Mapping[str, Any]) -> bool:
    shift = processor.get("shift") or 0
    return any(shift) if isinstance(shift, list | tuple) else bool(shift)


def architecture_table(records: Records) -> list[Row]:
    """Return what the network is."""
    config, file = records.config, "config.json"
    table: list[Row] = [("class", fact(records.export, "class", EXPORT))]
    if records.parameters is not None:
        table.append(
            (
                "parameters, fixed tables and statistics included",
                Fact(records.parameters, "headers of the weights", "count"),
            )
        )
    for label, path in (
        ("architecture of timm", "architecture"),
        ("image size", "image_size"),
        ("patch size", "patch_size"),
        ("width", "hidden_size"),
        ("blocks", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("decoder width", "decoder_hidden_size"),
        ("decoder blocks", "decoder_num_hidden_layers"),
    ):
        if (found := maybe(config, path, file)) is not None:
            table.append((label, found))
    return table
