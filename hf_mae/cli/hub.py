"""The commands from a run to the Hub and back: convert, export, card, publish, pull, demo, space."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from hf_mae.cards.options import CardOptions

Target = Literal["auto", "vit_mae", "vit", "beit", "timm", "onnx", "hf_mae"]
Weights = Literal["last", "best", "average"]
Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_EXPORT")]
Repository = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ORG/NAME")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


T = TypeVar("T")


def _parse(kind: type[T], command: str, description: str, arguments: Sequence[str]) -> T:
    return tyro.cli(
        kind,
        prog=f"hf-mae {command}",
        description=description,
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class ConvertArguments:
    """What `hf-mae convert` takes."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """An official .pth file; or a folder or Hub id (ORG/NAME) of a plain ViT of timm, or in the layout of
    facebook/vit-mae-*."""
    out: Out
    """The model folder to write."""
    license: str | None = None
    """Licence of the weights; the official files' own, cc-by-nc-4.0, is known."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalised patches, where neither the file nor its hash tells."""
    num_attention_heads: int | None = None
    """Of the encoder, where its width is none of the official ones."""
    decoder_num_attention_heads: int | None = None
    """Of the decoder, likewise."""
    image_size: tuple[int, ...] = ()
    """In pixels, where the grid of patches is not square: height and width; or one number."""
    image_mean: tuple[float, ...] = ()
    """Per channel, of pictures in [0, 1]; the source's or ImageNet's unless given."""
    image_std: tuple[float, ...] = ()
    """Likewise."""
    id2label: Path | None = None
    """A JSON file with the names of the classes: a list, or an object from 0 to n - 1."""
    overwrite: bool = False
    """Replace a folder that holds something else, or in which something was edited or added."""


def convert_command(arguments: Sequence[str]) -> None:
    """Turn weights of others into a model folder of this package."""
    given = _parse(
        ConvertArguments,
        "convert",
        "Write a model folder of this package from weights of others. Nothing is unpickled but tensors and plain data.",
        arguments,
    )
    from hf_mae.exporting.convert import convert

    if len(given.image_size) > 2:
        raise ValueError(f"image_size={given.image_size} has {len(given.image_size)} numbers; give one, or two")
    told = {
        "norm_pix_loss": given.norm_pix_loss,
        "num_attention_heads": given.num_attention_heads,
        "decoder_num_attention_heads": given.decoder_num_attention_heads,
        "image_size": given.image_size[0] if len(given.image_size) == 1 else given.image_size or None,
    }
    convert(
        given.source,
        given.out,
        id2label=None if given.id2label is None else _read_names(given.id2label),
        license=given.license,
        image_mean=given.image_mean or None,
        image_std=given.image_std or None,
        overwrite=given.overwrite,
        say=_say,
        **{name: value for name, value in told.items() if value is not None},
    )


def _read_names(path: Path) -> dict[int, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {int(row): str(name) for row, name in pairs}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f'id2label={path} holds no names of classes ({error}); write them as JSON: ["ant", "bee"], or '
            '{"0": "ant", "1": "bee"}'
        ) from error


@dataclass(frozen=True)
class ExportArguments:
    """What `hf-mae export` takes."""

    model: Model
    """A run folder, a model folder, a Hub id or an official .pth file."""
    out: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[OUT]")] = None
    """The folder to write; of a run, RUN/export/TARGET unless given."""
    target: Target = "auto"
    """The stock class: beit or vit for classifiers (by their pooling) and encoders, vit_mae for pretraining, timm,
    onnx; hf_mae is this package's own, with the decoder and every option."""
    weights: Weights = "last"
    """Of a run: those of the newest checkpoint, of the best evaluation, or the averaged ones."""
    image_mean: tuple[float, ...] = ()
    """Per channel, of pictures in [0, 1], in place of what the model's folder says."""
    image_std: tuple[float, ...] = ()
    """Likewise."""
    picture: Path | None = None
    """A photograph for the last check, the pipeline; scikit-learn's bundled one unless given."""
    code: bool = False
    """With --target hf_mae: put flat modelling files beside the weights, for people without this package."""
    overwrite: bool = False
    """Replace a folder that holds something else, or an export in which something was edited or added."""


def export_command(arguments: Sequence[str]) -> None:
    """Write stock files and prove them equal."""
    given = _parse(
        ExportArguments,
        "export",
        "Write a model as a stock class of transformers, as timm or as ONNX; compare it, in float64 and "
        "float32, in a process without this package; run the pipeline on a picture.",
        arguments,
    )
    from hf_mae.exporting.write import export

    processor = {"image_mean": list(given.image_mean), "image_std": list(given.image_std)}
    processor = {name: values for name, values in processor.items() if values}
    out = export(
        given.model,
        given.out,
        given.target,
        weights=given.weights,
        processor=processor or None,
        picture=given.picture,
        code=given.code,
        overwrite=given.overwrite,
        say=_say,
    )
    _say(f"{out}")


@dataclass(frozen=True)
class CardArguments:
    """What `hf-mae card` takes."""

    export: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="EXPORT")]
    """A folder that `hf-mae export` wrote."""
    repository: Repository
    """The id it is going to have; the usage lines name it."""
    run: Path | None = None
    """The run folder with the records; found when the export lies in RUN/export."""
    evaluations: tuple[Path, ...] = ()
    """Folders or files written by `hf-mae evaluate --out`."""
    overwrite: bool = False
    """Replace files of the card that were edited since it was written."""
    card: Annotated[CardOptions, tyro.conf.arg(name="")] = field(default_factory=CardOptions)


def card_command(arguments: Sequence[str]) -> None:
    """Write the model card of an export, and judge it."""
    given = _parse(
        CardArguments,
        "card",
        "Write the model card of an export from the records of its run, and check it as the Hub would. "
        "`hf-mae publish` does this too; here nothing leaves the machine.",
        arguments,
    )
    from hf_mae.cards.validate import validate_card
    from hf_mae.cards.write import write_card

    path = write_card(
        given.export,
        given.repository,
        given.card,
        run=given.run,
        evaluations=given.evaluations,
        overwrite=given.overwrite,
    )
    files = [f.relative_to(given.export).as_posix() for f in given.export.rglob("*") if f.is_file()]
    if problems := validate_card(path.read_text(encoding="utf-8"), files=files):
        raise ValueError(f"{path}: " + "; ".join(problems))
    _say(f"{path}")


@dataclass(frozen=True)
class PublishArguments:
    """What `hf-mae publish` takes."""

    source: Run
    """A run folder, a folder that `hf-mae export` wrote, or a model folder."""
    repository: Repository
    """Where it goes; made if need be."""
    target: Target = "auto"
    """What it becomes: a stock class of transformers (beit or vit for classifiers and encoders, vit_mae for
    pretraining), timm, onnx; hf_mae is this package's own class, with every option. auto takes the stock one."""
    weights: Weights = "last"
    """Of a run: those of the newest checkpoint, of the best evaluation, or the averaged ones."""
    private: bool = False
    """Make a new repository private."""
    create_pr: bool = False
    """Open a pull request rather than commit to the branch."""
    revision: str | None = None
    """A branch, made if need be; main unless given."""
    dry_run: bool = False
    """Do everything but write to the Hub: export, card, checks, the list of files, the verdict."""
    checkpoint: bool = False
    """Add the newest checkpoint with optimizer and data state, so that `hf-mae pull` continues elsewhere."""
    overwrite_edits: bool = False
    """Undo what was edited since the last publish, such as the card: on the Hub, and in the run's export folder. An
    export that is named itself goes up as it was edited."""
    code: bool = False
    """With --target hf_mae: flat modelling files beside the weights, for people without this package."""
    evaluations: tuple[Path, ...] = ()
    """Folders or files written by `hf-mae evaluate --out`, for the card's results."""
    message: str | None = None
    """Of the commit."""
    card: Annotated[CardOptions, tyro.conf.arg(name="")] = field(default_factory=CardOptions)


def publish_command(arguments: Sequence[str]) -> None:
    """Export, write the card, check, upload in one commit, read back."""
    given = _parse(
        PublishArguments,
        "publish",
        "Put a run or an export on the Hub: stock files, a card made from the run's records, checks, one "
        "commit, and a look at what arrived. Log in first with `hf auth login`.",
        arguments,
    )
    from hf_mae.hub.publish import publish

    publish(
        given.source,
        given.repository,
        target=given.target,
        weights=given.weights,
        private=given.private,
        create_pr=given.create_pr,
        revision=given.revision,
        dry_run=given.dry_run,
        checkpoint=given.checkpoint,
        overwrite_edits=given.overwrite_edits,
        code=given.code,
        card=given.card,
        evaluations=given.evaluations,
        message=given.message,
        say=_say,
    )


def pull_command(arguments: Sequence[str]) -> None:
    """Bring a published checkpoint here."""

    def pull(repository: Repository, out: Out, revision: str | None = None) -> None:
        """Make a run folder from a checkpoint that `hf-mae publish --checkpoint` put on the Hub.

        Args:
            repository: where it lies.
            out: the run folder to make.
            revision: branch, tag or commit.
        """
        from hf_mae.hub.pull import pull as bring

        bring(repository, out, revision=revision, say=_say)

    tyro.cli(pull, prog="hf-mae pull", args=list(arguments))


@dataclass(frozen=True)
class DemoArguments:
    """What `hf-mae demo` takes."""

    reconstruct: str | None = None
    """A pretraining model with its decoder: a run folder, a model folder or a Hub id."""
    classify: str | None = None
    """A classifier: a run folder, a model folder or a Hub id; of ours, stock, or timm."""
    examples: tuple[Path, ...] = ()
    """Pictures to offer."""
    port: int = 7860
    """Of the page, on this machine only."""


def demo_command(arguments: Sequence[str]) -> None:
    """Show a model in the browser."""
    given = _parse(
        DemoArguments,
        "demo",
        "Show a model in the browser, on this machine only; needs hf_mae[demo].",
        arguments,
    )
    from hf_mae.demo.app import launch

    launch(reconstruct=given.reconstruct, classify=given.classify, examples=given.examples, port=given.port, say=_say)


@dataclass(frozen=True)
class SpaceArguments:
    """What `hf-mae space` takes."""

    out: Out
    """The folder to write."""
    reconstruct: str | None = None
    """Hub id of a pretraining model with its decoder."""
    classify: str | None = None
    """Hub id of a classifier."""
    title: str | None = None
    """Of the page; made of the model's names unless given."""
    overwrite: bool = False
    """Replace a folder that this command wrote."""


def space_command(arguments: Sequence[str]) -> None:
    """Write a Space."""
    given = _parse(
        SpaceArguments,
        "space",
        "Write a Hugging Face Space, the page of `hf-mae demo` for published models. Upload it with "
        "`hf upload ORG/NAME OUT --repo-type space`.",
        arguments,
    )
    from hf_mae.demo.space import write_space

    out = write_space(
        given.out,
        reconstruct=given.reconstruct,
        classify=given.classify,
        title=given.title,
        overwrite=given.overwrite,
    )
    _say(f"{out}: upload it with `hf upload ORG/NAME {shlex.quote(str(out))} --repo-type space`")
