"""Dividing one split into train, validation and test: by a rule, or by lists of rows in a file.

A part is a view (`Subset`) of the same source, so each has its own transform: what augments training never reaches the
rows that are tested on. A rule is a function of the number of rows, their labels and its own seed, so writing it in a
recipe is enough; a file keeps the lists themselves, and names the data they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_mae.data.formats import UNREADABLE, Chunk, Source, fingerprint
from hf_mae.data.order import Ints
from hf_mae.recipes.fields import unknown

PARTS = ("train", "validation", "test")
"""Names of the parts, in their order."""

_RULE = re.compile(r"([a-z]+):([\d./]+)(?:@(\d+))?")
_LIKE_A_RULE = re.compile(r"[A-Za-z]+:\d")
_EXAMPLES = "rules are such as stratified:80/10/10@3334 or random:95/5 (parts in percent, seed)"


@dataclass(frozen=True)
class Rule:
    """How rows are divided."""

    kind: Literal["stratified", "random"]
    """`stratified` gives every part the same share of each class, `random` looks at no label."""
    percent: tuple[float, ...]
    """Of the rows, for train, validation and, where there are three, test."""
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts."""
        return PARTS[: len(self.percent)]

    def __str__(self) -> str:
        return f"{self.kind}:{'/'.join(f'{p:g}' for p in self.percent)}@{self.seed}"

    def sizes(self, rows: int) -> list[int]:
        """Return the rows of each part: shares are rounded down, the last part takes what is left.

        Raises:
            ValueError: a part would be empty.
        """
        counts = [int(rows * percent / 100) for percent in self.percent[:-1]]
        counts.append(rows - sum(counts))
        for name, count in zip(self.names, counts, strict=True):
            if not count:
                raise ValueError(f"data.splits={str(self)!r} leaves {name} none of the {rows} rows; give it more")
        return counts


@dataclass(frozen=True)
class Splits:
    """Which rows of a source are in which part; a row is in one part at most."""

    parts: dict[str, Ints]
    """Row numbers, counted through the source, of each part."""
    rule: str
    """How they were chosen; in words where no rule of ours was used."""
    of: dict[str, Any]
    """What was divided: `split`, `fingerprint` and `rows` of the source."""

    @property
    def split(self) -> str | None:
        """Name of the split that was divided, where it is known."""
        name = self.of.get("split")
        return name if isinstance(name, str) and name else None


def parse_rule(text: str) -> Rule | None:
    """Read a rule such as `stratified:80/10/10@3334`; the seed may be left out and is 0 then.

    Returns:
        The rule; None where the text does not look like one, and so names a file.

    Raises:
        ValueError: it looks like a rule and is none; gives examples.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        if _LIKE_A_RULE.match(text) and not Path(text).exists():
            raise ValueError(f"data.splits={text!r} is neither a rule nor a file; {_EXAMPLES}")
        return None
    kind, shares, seed = match.groups()
    if kind not in ("stratified", "random"):
        raise ValueError(f"data.splits={text!r}: {kind} is neither stratified nor random; {_EXAMPLES}")
    try:
        percent = tuple(float(share) for share in shares.split("/"))
    except ValueError as error:
        raise ValueError(f"data.splits={text!r}: {shares} are not numbers; {_EXAMPLES}") from error
    if len(percent) not in (2, 3):
        raise ValueError(f"data.splits={text!r} has {len(percent)} part(s), and two or three are possible; {_EXAMPLES}")
    if min(percent) <= 0 or abs(sum(percent) - 100) > 1e-9:
        raise ValueError(
            f"data.splits={text!r}: the parts must be above 0 and sum to 100, not {sum(percent):g}; {_EXAMPLES}"
        )
    if seed is not None and int(seed) >= 2**32:
        raise ValueError(f"data.splits={text!r}: the seed must lie in 0 .. 4294967295")
    return Rule(kind, percent, int(seed or 0))


# ------------------------------------------------------------------------------------------------ making them


def make_splits(
    rule: Rule,
    labels: Ints | None,
    rows: int,
    *,
    split: str = "train",
    fingerprint: str = "",
    names: Sequence[str] | None = None,
    where: str = "the data",
) -> Splits:
    """Divide rows by a rule: a pure function of it, the number of rows and, where it is stratified, the labels.

    `random` is what `torch.utils.data.random_split` does with a generator of that seed; `stratified` is scikit-learn's
    `train_test_split`, the last part being cut off first. Rows that cannot be read have no class: they go to train,
    where they are counted as bad.

    Args:
        rule: from `parse_rule`.
        labels: int64 [rows] from `Source.all_labels`; `random` does without.
        rows: how many there are.
        split: that is divided.
        fingerprint: of the source.
        names: of the classes, for messages.
        where: the data in words, for messages.

    Raises:
        ValueError: a part would be empty; or the rule is stratified, and labels are missing or a class has too few rows
            to be in each part. Says what to do.
    """
    sizes = rule.sizes(rows)
    if rule.kind == "random":
        import torch

        order = torch.randperm(rows, generator=torch.Generator().manual_seed(rule.seed)).numpy()
        cut = np.split(order, np.cumsum(sizes)[:-1])
        parts = dict(zip(rule.names, cut, strict=True))
    elif rule.kind != "stratified":
        raise unknown("kind", rule.kind, ("stratified", "random"))
    else:
        parts = _stratify(rule, sizes, labels, names, where)
    of = {"split": split, "fingerprint": fingerprint, "rows": rows}
    return Splits(parts, str(rule), of)


def _stratify(
    rule: Rule, sizes: Sequence[int], labels: Ints | None, names: Sequence[str] | None, where: str
) -> dict[str, Ints]:
    from sklearn.model_selection import train_test_split

    named = f"data.splits={str(rule)!r}"
    instead = f"random:{str(rule).partition(':')[2]}"
    if labels is None:
        raise ValueError(
            f"{named} needs the label of every row of {where}, and reading them would mean asking the server for each; "
            f"add --data.no-streaming to download the data set first, or use --data.splits {instead}"
        )
    if missing := int((labels == -1).sum()):
        raise ValueError(
            f"{named}: {missing:,} of the {len(labels):,} rows of {where} have no label; remove them, name another "
            f"--data.label-column, or use --data.splits {instead}"
        )

    def name(label: int) -> str:
        return repr(names[label]) if names is not None and 0 <= label < len(names) else str(label)

    rest = np.flatnonzero(labels != UNREADABLE)
    classes, counts = np.unique(labels[rest], return_counts=True)
    if (few := counts < len(sizes)).any():
        listed = ", ".join(f"{name(int(c))} ({n})" for c, n in zip(classes[few][:5], counts[few][:5], strict=True))
        raise ValueError(
            f"{named}: {int(few.sum()):,} of {len(classes):,} classes have fewer than {len(sizes)} images, one for "
            f"each part: {listed}; collect more, leave those classes out, or use --data.splits {instead}"
        )
    found: dict[str, Ints] = {}
    for part, size in zip(reversed(rule.names[1:]), reversed(sizes[1:]), strict=True):
        # scikit-learn's own two conditions, in words that name the part.
        if min(size, len(rest) - size) < len(classes):
            raise ValueError(
                f"{named}: {part} would have {size} of {len(rest)} rows, and {len(classes)} classes need one each on "
                f"both sides; make {part} larger or smaller, or use --data.splits {instead}"
            )
        classes, counts = np.unique(labels[rest], return_counts=True)
        if counts.min() < 2:
            raise ValueError(
                f"{named}: class {name(int(classes[counts.argmin()]))} has a single row left for the parts before "
                f"{part}; give train and validation more, or use --data.splits {instead}"
            )
        cut = train_test_split(rest, test_size=size, random_state=rule.seed, stratify=labels[rest])
        rest, found[part] = (np.asarray(rows, dtype=np.int64) for rows in cut)
    found["train"] = np.concatenate([rest, np.flatnonzero(labels == UNREADABLE)])
    return {part: found[part] for part in rule.names}


_made: dict[tuple[str, str], Splits] = {}


def split_source(source: Source, rule: Rule, *, split: str = "train") -> Splits:
    """Divide a source by a rule; the labels are looked through once in a process.

    Args:
        source: from `open_source`, the whole of it.
        rule: from `parse_rule`.
        split: name of what is divided, to be kept beside the lists.

    Raises:
        ValueError: as `make_splits`; or the rule is stratified and there are no labels.
    """
    key = source.fingerprint, str(rule)
    if key not in _made:
        labels = None
        if rule.kind == "stratified":
            if not source.has_labels:
                raise ValueError(
                    f"data.splits={str(rule)!r} needs labels, and {source.where} has none; name the column with "
                    f"--data.label-column, or use --data.splits random:{str(rule).partition(':')[2]}"
                )
            labels = source.all_labels()
        _made[key] = make_splits(
            rule,
            labels,
            int(source.sizes.sum()),
            split=split,
            fingerprint=source.fingerprint,
            names=source.label_names,
            where=source.where,
        )
    return _made[key]


# ------------------------------------------------------------------------------------------------ files


def write_splits(path: Path, splits: Splits, *, overwrite: bool = False) -> None:
    """Write the lists as JSON; the file is whole or absent.

    Raises:
        ValueError: there is such a file with other content, and it is not to be overwritten.
    """
    parts = {name: rows.tolist() for name, rows in splits.parts.items()}
    text = json.dumps({"rule": splits.rule, "of": splits.of, "parts": parts})
    if path.is_dir():
        raise ValueError(f"out={str(path)!r} is a folder; name a file, such as {path / 'splits.json'}")
    if path.exists() and not overwrite:
        if path.read_bytes() == text.encode():
            return
        raise ValueError(
            f"out={str(path)!r} exists and holds something else, and runs may depend on it; name another file with "
            "--out, or pass --overwrite"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_splits(path: Path) -> Splits:
    """Read what `write_splits` has written, or what others wrote in the same form.

    Raises:
        ValueError: there is no such file, it is no JSON of this form, a part has another name, or a row is twice in it
            or beyond the data it names.
    """
    named = f"data.splits={str(path)!r}"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{named} is neither a rule nor a file; {_EXAMPLES}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{named} cannot be read as JSON ({error}); write it with `hf-mae split`") from error
    form = '{"rule": TEXT, "of": {"split": TEXT, "fingerprint": TEXT, "rows": NUMBER}, "parts": {"train": [ROWS], ...}}'
    if not (
        isinstance(found, dict)
        and isinstance(of := found.get("of"), dict)
        and isinstance(of.get("rows"), int)
        and isinstance(of.get("fingerprint"), str)
        and isinstance(parts := found.get("parts"), dict)
        and all(isinstance(rows, list) and all(type(r) is int for r in rows) for rows in parts.values())
    ):
        raise ValueError(f"{named} is not of the form {form}; write it with `hf-mae split`")
    if unknown := [name for name in parts if name not in PARTS]:
        raise ValueError(f"{named} has the part(s) {', '.join(unknown)}; parts are called {', '.join(PARTS)}")
    if empty := [name for name in ("train", *parts) if not parts.get(name)]:
        raise ValueError(f"{named}: the part {empty[0]} has no rows; write the file anew with `hf-mae split`")
    lists = {name: np.array(parts[name], dtype=np.int64) for name in PARTS if name in parts}
    together = np.concatenate(list(lists.values()))
    if (wrong := together[(together < 0) | (together >= of["rows"])]).size:
        raise ValueError(f"{named} names row {wrong[0]}, and the data has rows 0 to {of['rows'] - 1}; write it anew")
    rows, counts = np.unique(together, return_counts=True)
    if (counts > 1).any():
        first = int(rows[counts > 1][0])
        where = " and ".join(name for name, part in lists.items() if first in part)
        raise ValueError(f"{named} names row {first} twice (in {where}); a row belongs to one part, write it anew")
    return Splits(lists, str(found.get("rule", "lists of rows")), dict(of))


def check_splits(splits: Splits, source: Source, named: str) -> None:
    """Refuse lists that were made for other data.

    Args:
        splits: from `read_splits`.
        source: whose rows they are to name.
        named: where the lists come from, for the message.

    Raises:
        ValueError: fingerprint or number of rows differ; names both.
    """
    here = {"fingerprint": source.fingerprint, "rows": int(source.sizes.sum())}
    for name, value in here.items():
        if splits.of[name] not in (value, source.former_fingerprint):
            raise ValueError(
                f"data.splits={named!r} was made for data with {name} {splits.of[name]!r}, and {source.where} has "
                f"{value!r}: files were added, removed or changed, or the data are read in another way (streamed, "
                "downloaded); write it anew with `hf-mae split`, or give the rule itself, which divides the rows as "
                "they are now: by their number and order and, where it is stratified, their labels"
            )


# ------------------------------------------------------------------------------------------------ a part


class Subset(Source):
    """Some rows of a source, in its order; chunks of which none is chosen are gone.

    Args:
        base: the source.
        rows: [n] row numbers, counted through the source, each once, in any order.
        beside: rows of the other parts of the same division, where it matters to a run that they stay what they are.
        where: the part in words.
    """

    def __init__(self, base: Source, rows: Ints, *, beside: Sequence[Ints] = (), where: str = "") -> None:
        self.base, self.rows = base, np.sort(rows)
        ends: Ints = np.cumsum(base.sizes)
        chunks = np.searchsorted(ends, self.rows, side="right")
        self._chunks, first = np.unique(chunks, return_index=True)
        inside = self.rows - (ends - base.sizes)[chunks]
        self._inside: list[Ints] = np.split(inside, first[1:])
        self.sizes = np.array([len(part) for part in self._inside], dtype=np.int64)
        digests = [hashlib.sha256(np.sort(part).astype("<i8").tobytes()).hexdigest() for part in (rows, *beside)]
        self.fingerprint = fingerprint("subset", base.fingerprint, *digests)
        self.kind, self.num_shards, self.bytes_per_row = base.kind, base.num_shards, base.bytes_per_row
        self.has_labels, self.label_names = base.has_labels, base.label_names
        self.revision, self.schema, self.remote = base.revision, base.schema, base.remote
        self.pixel_range, self.why_unlabelled = base.pixel_range, base.why_unlabelled
        if base.former_fingerprint is not None:
            self.former_fingerprint = fingerprint("subset", base.former_fingerprint, *digests)
        self.where = where or f"{len(self.rows):,} rows of {base.where}"
        self.notes = [*base.notes, f"{len(self.rows):,} of {int(base.sizes.sum()):,} rows"]

    def read(self, chunk: int) -> Chunk:
        """Read the chunk of the source and keep the rows of this part."""
        data, inside = self.base.read(int(self._chunks[chunk])), self._inside[chunk]
        return Chunk([data.images[row] for row in inside.tolist()], data.labels[inside], error=data.error)

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the shard and the row as the source does."""
        return self.base.describe(int(self._chunks[chunk]), int(self._inside[chunk][row]))

    def labels(self, chunk: int) -> Ints | None:
        """Return the labels of a chunk, where the source gives them."""
        labels = self.base.labels(int(self._chunks[chunk]))
        return None if labels is None else labels[self._inside[chunk]]

    def all_labels(self) -> Ints | None:
        """Return the labels of the rows of this part."""
        labels = self.base.all_labels()
        return None if labels is None else labels[self.rows]

    def names(self, chunk: int) -> list[str] | None:
        """Return the file names of the rows of this part, where the source keeps them."""
        names = self.base.names(int(self._chunks[chunk]))
        return None if names is None else [names[row] for row in self._inside[chunk].tolist()]


def counts_in_words(splits: Splits) -> str:
    """Say how many rows each part has."""
    return ", ".join(f"{name} {len(rows):,}" for name, rows in splits.parts.items())
