"""What only the author of a model card can say; everything else comes from records (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What is not in the records of a run: the terms, the names on the Hub, and pictures of one's own."""

    license: str | None = None
    """Licence of the weights as the Hub writes it (`apache-2.0`, `cc-by-nc-4.0`, `other`). None takes that of the
    weights they derive from; weights under non-commercial terms keep them."""
    license_name: str | None = None
    """Of `license=other`: the name of the licence."""
    license_link: str | None = None
    """Of `license=other`: the address of its text."""
    base_license: str | None = None
    """Licence of the model that the training started from, where it is gone and no record says. Look it up: it binds
    the weights."""
    data_license: str | None = None
    """Terms of the training images, in words or as a Hub name."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the training data. Without any, the data set of the run, if it is one of the Hub."""
    data_name: str | None = None
    """Name of the training data in words (`CIFAR-10, 5,000 of its training images`), where it is not on the Hub. None
    takes the last part of its path."""
    test_name: str | None = None
    """Name of the data that the run measured on, in words (`CIFAR-10`), where it is not on the Hub. None takes the last
    part of the path."""
    language: tuple[str, ...] = ()
    """Languages of the class names, as ISO 639 codes (`en`)."""
    base_model: str | None = None
    """Hub id of the model that the training started from. None takes the run's, if it is one of the Hub."""
    title: str | None = None
    """Heading of the card; None takes the name of the repository."""
    tags: tuple[str, ...] = ()
    """Further tags."""
    sample: tuple[Path, ...] = ()
    """Pictures of your own, which may be published: what the widget offers, and what is reconstructed. Without any,
    the card has none."""
    author: str | None = None
    """Who publishes the model."""
    run_pictures: bool = False
    """Show the run's own reconstructions, which are of training or test images. Only where these may be published."""
