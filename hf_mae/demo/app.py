"""The page: reconstruction and classification of a visitor's own picture, with gradio (`pip install hf_mae[demo]`).

`gr.Interface.from_pipeline` is not used: it breaks with transformers 5.23 (its table names pipelines that are gone).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mae.demo.models import (
    MAX_SEED,
    Classifier,
    Reconstructor,
    classify_picture,
    load_classifier,
    load_reconstructor,
    reconstruct_picture,
)
from hf_mae.models.masking import STRATEGIES

if TYPE_CHECKING:
    import gradio as gr

MAX_RATIO = 0.95
MAX_WAITING = 32
"""Visitors that may wait for their turn; the next is told to come back."""

MAX_AT_ONCE = 1
"""Pictures computed at once, of each tab: a model takes all cores of a small machine."""

KEEP_SECONDS = 3600
"""How long the files of visitors stay on the machine of the page."""


def build(*, reconstruct: str | None, classify: str | None, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Load the models and lay out the page, without serving it.

    Args:
        reconstruct: a pretraining model with its decoder: a run folder, a model folder or a Hub id.
        classify: a classifier: the same; of ours, of stock transformers, or in timm's format.
        examples: pictures to offer.

    Raises:
        ValueError: no model is named or one cannot be loaded, an example is no file, or gradio is not installed.
    """
    if reconstruct is None and classify is None:
        raise ValueError("no model is named; give reconstruct=MODEL, classify=MODEL or both")
    for path in examples:
        if not path.is_file():
            raise ValueError(f"examples: {path} is not a file; name image files")
    gr = _gradio()
    tabs: list[tuple[str, Any]] = []
    if reconstruct is not None:
        tabs.append(("Reconstruction", _reconstruction(gr, load_reconstructor(reconstruct), examples)))
    if classify is not None:
        tabs.append(("Classification", _classification(gr, load_classifier(classify), examples)))
    title = ", ".join(name.lower() for name, _ in tabs).capitalize()
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        for name, interface in tabs:
            with gr.Tab(name):
                interface.render()
    return page


def launch(
    *,
    reconstruct: str | None,
    classify: str | None,
    examples: Sequence[Path] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until Ctrl-C, on this machine only: no public link, nothing sent elsewhere.

    Args:
        reconstruct: see `build`.
        classify: see `build`.
        examples: see `build`.
        host: address to listen on.
        port: likewise.
        say: takes a line for people.

    Raises:
        ValueError: see `build`; or the port is taken.
    """
    page = build(reconstruct=reconstruct, classify=classify, examples=examples)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=MAX_AT_ONCE)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            quiet=True,
            max_file_size="50mb",
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ValueError(f"port={port} of {host} cannot be listened on ({error}); choose another --port") from error
    if say is not None:
        say(f"open {url} in a browser; Ctrl-C ends")
    page.block_thread()


def _gradio() -> Any:
    # Read when gradio is imported: without it, gradio reports every start to its makers.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f'the page needs gradio ({error}); pip install "hf_mae[demo]"') from error
    return gradio


def _reconstruction(gr: Any, reconstructor: Reconstructor, examples: Sequence[Path]) -> Any:
    config = reconstructor.model.config

    def reconstruct(picture: str | None, mask_ratio: float, strategy: Any, seed: float | None) -> Any:
        _require(gr, picture)
        try:
            return reconstruct_picture(
                reconstructor, str(picture), mask_ratio=mask_ratio, strategy=strategy, seed=int(seed or 0)
            )
        except ValueError as error:
            raise gr.Error(_sentence(error), print_exception=False) from error

    return gr.Interface(
        reconstruct,
        inputs=[
            _picture(gr),
            gr.Slider(0, MAX_RATIO, value=min(config.mask_ratio, MAX_RATIO), step=0.05, label="Mask ratio"),
            gr.Radio(list(STRATEGIES), value=config.mask_strategy, label="Mask strategy"),
            gr.Number(0, minimum=0, maximum=MAX_SEED, precision=0, label="Seed of the mask"),
        ],
        outputs=[
            gr.Gallery(label="Reconstruction", columns=2, height="max-content", object_fit="contain", format="png"),
            gr.Markdown(),
        ],
        examples=[[str(path), None, None, None] for path in examples] or None,  # settings stay as they are
        cache_examples=False,
        description=(
            f"{_link(reconstructor.name)} sees the patches that stay and predicts the others. It was trained with "
            f"{config.mask_ratio:.0%} removed ({config.mask_strategy})."
        ),
        submit_btn="Reconstruct",
        flagging_mode="never",
        analytics_enabled=False,
        api_name="reconstruct",
    )


def _classification(gr: Any, classifier: Classifier, examples: Sequence[Path]) -> Any:
    def classify(picture: str | None) -> dict[str, float]:
        _require(gr, picture)
        try:
            return classify_picture(classifier, str(picture))
        except ValueError as error:
            raise gr.Error(_sentence(error), print_exception=False) from error

    own = (
        " Each class is judged on its own, so that scores do not add up to 100 %." if classifier.each_on_its_own else ""
    )
    return gr.Interface(
        classify,
        inputs=_picture(gr),
        outputs=gr.Label(num_top_classes=5, label="Classes"),
        examples=[[str(path)] for path in examples] or None,
        cache_examples=False,
        description=(
            f"{_link(classifier.name)} knows {len(classifier.classes)} classes and has to choose among them, whatever "
            f"it is shown.{own}"
        ),
        submit_btn="Classify",
        flagging_mode="never",
        analytics_enabled=False,
        api_name="classify",
    )


def _picture(gr: Any) -> Any:
    """Make the input for a picture, which hands over the file as it is: decoding it is ours, as in training."""
    picture = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture", height=320)
    read = picture.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)  # gradio reads the header first
        except (OSError, ValueError, SyntaxError) as error:
            sentence = "This file is no picture that can be read; take a JPEG, PNG or WebP file."
            raise gr.Error(sentence, print_exception=False) from error

    # Of the instance: for a class derived from its own, gradio writes a .pyi file beside this one.
    picture.preprocess = preprocess
    return picture


def _require(gr: Any, picture: str | None) -> None:
    if picture is None:
        raise gr.Error("There is no picture yet: drop one into the field, or choose an example.", print_exception=False)


def _sentence(error: ValueError) -> str:
    text = str(error).rstrip(".")
    name = "=" in text.split(" ", 1)[0]  # mask_ratio=0 is written as it is
    return f"{text if name else text[:1].upper() + text[1:]}."


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if name.count("/") == 1 else f"`{name}`"
