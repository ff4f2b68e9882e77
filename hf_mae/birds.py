"""The ReXNet bird classifier in its stages, as the slides tell it and as it should have been.

Source: KHU spring competition 2022, team 5. The slides' ten stages and where they are here:

 1. data: one folder per species; `--data.path`.
 2. split: 95/5 at random, or stratified; `hf_mae.data.splits`, written to splits.json.
 3. model: ReXNet x1.0, below five million parameters; the recipe's `model`.
 4. augment: pipelines (a) to (f); `hf_mae.recipes.supervised.BIRD_AUGMENTS`, compared by `hf-mae sweep augment`.
 5. lr_find: `lr_find` before training, descending as published or ascending; the recipe's lr does not follow it.
 6. loss: cross-entropy with label smoothing .06; compared by `hf-mae sweep over`.
 7. optim: AdamW, constant lr; or cosine and averaged weights.
 8. train: 46 of 50 epochs, the best epoch on the validation split is kept; or the last, averaged weights.
 9. finetune_val: four epochs on the validation split. Here it is scored on a split that nothing has seen, beside as
    many updates on the training split.
10. side trials: `hf_mae.data.background`, and the stratified split.

Each stage is a run of its own folder and continues where it was, so a killed command goes on.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hf_mae.data.sources import list_splits, open_source
from hf_mae.evaluate import evaluate
from hf_mae.evaluation.charts import draw_learning
from hf_mae.lr_find import lr_find
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.recipes.fields import unknown
from hf_mae.recipes.supervised import SUPERVISE, SuperviseRecipe, check_supervise
from hf_mae.run import last_model
from hf_mae.supervise import supervise
from hf_mae.training.checkpoint import write_atomic
from hf_mae.training.distributed import make_accelerator
from hf_mae.training.monitors import Printer, read_rows

FINETUNE_VAL = "rexnet-birds-finetune-val"
"""The preset of stage 9."""


def train_birds(
    recipe: SuperviseRecipe,
    *,
    finetune: bool = True,
    find_lr: Literal["no", "ascending", "descending"] = "no",
    lr_find_steps: int | None = None,
    say: Printer | None = None,
) -> dict[str, Any]:
    """Run the stages of the bird classifier one after the other. A collective: every process calls it.

    Args:
        recipe: stage 1 to 8, a `rexnet-birds-*` preset with `data.path`; `out` is the folder of all stages.
        finetune: run stage 9 and, beside it, as many updates on the training split.
        find_lr: run stage 5 first, for the record; descending between the rates of the slides.
        lr_find_steps: updates of stage 5; None is 100, or the slides' 1000 where the rate falls.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        What is written to `birds.json`: top-1 of each stage's model on the validation and on the test split (None where
        there is no test split), and what stage 5 found (None where it was not asked for). `birds.md` and pictures are
        beside it.

    Raises:
        ValueError: as of `supervise`; a test split is named that is trained on.
    """
    check_supervise(recipe)
    main = make_accelerator(recipe.engine).is_main_process
    say = say or Printer(main)
    out = Path(recipe.out or f"runs/{recipe.name}")
    test = "test" if "test" in list_splits(recipe.data) else None
    if test is None:
        say("no test split: nothing is left to measure stage 9 on (--data.splits stratified:80/10/10 leaves one)")
    train = replace(recipe, out=str(out / "train"))
    found_lr = None
    if find_lr != "no":
        search = replace(train, out=str(out / "lr_find"))
        found = lr_find(search, steps=lr_find_steps, descending=find_lr == "descending", reuse=True, say=say)
        found_lr = {key: found[key] for key in ("low", "high", "steps", "descending", "suggestion", "why")}
    folder = supervise(train)
    kept: Literal["best", "averaged"] = "averaged" if recipe.evals.best == "ema_top1" else "best"
    models: dict[str, Path] = {"train": _model(folder, kept)}
    if finetune:
        stage_9 = SUPERVISE[FINETUNE_VAL]
        rows, batch = int(open_source(recipe.data, split="validation").sizes.sum()), recipe.global_batch
        steps = int(stage_9.epochs) * math.ceil(rows / batch)  # the slides' loader keeps the short last batch
        for name, split in (("finetune_val", "validation"), ("finetune_train", recipe.data.split or "train")):
            stage = _stage_9(train, stage_9, models["train"], out / name, split, steps, test)
            models[name] = _model(supervise(stage), "last")
    results = {name: _score(name, model, recipe, test, out, say) for name, model in models.items()}
    summary = {"recipe": recipe.name, "seed": recipe.seed, "splits": recipe.data.splits}
    summary |= {"lr_find": found_lr, "results": results}
    if main:
        write_atomic(out / "birds.json", json.dumps(summary, indent=2) + "\n")
        write_atomic(out / "birds.md", table(results))
        draw_learning({recipe.name: read_rows(folder / "metrics.jsonl")}, out / "learning.png")
    say(table(results) + f"in {out}")
    return summary


def _stage_9(
    train: SuperviseRecipe, stage: SuperviseRecipe, model: Path, out: Path, split: str, steps: int, test: str | None
) -> SuperviseRecipe:
    """Return the recipe of stage 9 on a split, with the sizes, batch and loader of the training before it."""
    held_out = test or ("validation" if split != "validation" else None)
    return replace(
        stage,
        out=str(out),
        init_from=str(model),
        seed=train.seed,
        max_steps=steps,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        num_workers=train.num_workers,
        eval_every=0,
        save_every=train.save_every,
        log_every=train.log_every,
        data=replace(train.data, split=split),
        model=replace(train.model, drop_rate=stage.model.drop_rate),
        augment=replace(
            stage.augment,
            crop=train.augment.crop,
            scale=train.augment.scale,
            mean=train.augment.mean,
            std=train.augment.std,
        ),
        evals=replace(stage.evals, split=held_out),
        engine=train.engine,
    )


def _model(folder: Path, which: Literal["best", "averaged", "last"]) -> Path:
    """Return the model of a run that the next stage starts from: the best epoch's, or the last (averaged) one.

    Raises:
        RuntimeError: the run was stopped by a signal and has none yet.
    """
    if (folder / "stopped_by_signal").exists():
        raise RuntimeError(f"{folder} was stopped by a signal; the same command goes on with it")
    if which not in ("best", "averaged", "last"):
        raise unknown("which", which, ("best", "averaged", "last"))
    if which == "best":
        return folder / "best" / "model"
    last = last_model(folder)
    assert last is not None, "a run that has ended is saved"
    return last.with_name("model_ema") if which == "averaged" else last


def _score(
    name: str, model: Path, recipe: SuperviseRecipe, test: str | None, out: Path, say: Printer
) -> dict[str, Any]:
    """Return the top-1 of a model on the splits, from its evaluations' own records."""
    found: dict[str, Any] = {"model": str(model)}
    for split in ("validation", "test"):
        if split == "test" and test is None:
            found[split] = None
            continue
        data = replace(recipe.data, split=split)
        wish = replace(EVALUATIONS["own"], model=str(model), data=data, out=str(out / "evaluation" / f"{name}_{split}"))
        found[split] = evaluate(replace(wish, pictures=recipe.evals.pictures and split == "test"))["top1"]
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the stages' results."""
    notes = {
        "train": "stages 1 to 8",
        "finetune_val": "stage 9: four epochs on the validation split, which says nothing of itself any more",
        "finetune_train": "as many updates on the training split instead",
    }
    lines = ["| stage | validation top-1 | test top-1 | |", "|---|---|---|---|"]
    for name, found in results.items():
        validation = "trained on" if name == "finetune_val" else f"{found['validation']:.4f}"
        test = "not measured" if found["test"] is None else f"{found['test']:.4f}"
        lines.append(f"| {name} | {validation} | {test} | {notes[name]} |")
    return "\n".join(lines) + "\n"
