"""What a record may say in public: paths cut to their last part, no process numbers, names of machines or keys.

Which fields hold paths is known, so that one is cut whatever characters it has; elsewhere, what looks like a path is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

PRIVATE = frozenset({"pids", "hostname", "host", "user", "command", "node"})
"""Names of what is nobody's business."""
NAMES = frozenset({"classes", "label_names", "id2label", "label2id", "label", "answers"})
"""Names of classes, which may hold slashes."""
PATHS = frozenset(
    {
        *("path", "out", "init_from", "splits", "resume", "model", "data", "split_file", "image_folder", "csv"),
        *("where", "file", "folder", "picture", "shard", "real", "recipe_file", "run", "name_or_path"),
    }
)
"""Fields that hold a path where they hold text."""

_RULE = re.compile(r"[a-z_]+:[\d./,]+(?:@\d+)?")
"""A way to divide data, such as stratified:90/10@3334."""
_LOOKS_LIKE_A_PATH = re.compile(r"^(?:/|~|\.{1,2}[\\/]|\\\\|[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]*://|file:)")
_IN_A_SENTENCE = re.compile(
    r"(?<![\w:/.~])(?:(?:~|\.{1,2})?/[\w.@+-]+(?:/[\w.@+-]+)+/?|~/[\w.@+-]+|[A-Za-z]:\\[^\s,;:'\"]+|\\\\[\w.$-]+\\[^\s,;:'\"]+)"
)
_USER_OF_URL = re.compile(r"(?<=://)[^\s/@]+@")


def published(value: Any, keep: Collection[str] = (), field: str = "") -> Any:
    """Return a record as it may be published.

    Args:
        value: of JSON.
        keep: names that are no paths, though they look like one: repositories of the Hub.
        field: that holds the value.
    """
    if isinstance(value, Mapping):
        return {k: v if k in NAMES else published(v, keep, str(k)) for k, v in value.items() if k not in PRIVATE}
    if isinstance(value, list | tuple):
        return [published(v, keep, field) for v in value]
    if not isinstance(value, str) or value in keep:
        return value
    if field == "platform":
        return value.partition("-")[0]  # kernels and hosts have names of their own
    if field in PATHS:
        return value if _RULE.fullmatch(value) else last_part(value)
    return without_path(value)


def last_part(path: str) -> str:
    """Return what follows the last separator, whatever the characters before it."""
    plain = path.partition("?")[0] if "://" in path else path
    return re.split(r"[\\/]", plain.rstrip("/\\"))[-1].removeprefix("file:") or "(path)" if plain else ""


def without_path(text: str) -> str:
    """Return a text with paths of a machine cut to their last part, and without the user of an address."""
    if _LOOKS_LIKE_A_PATH.match(text) and not re.match(r"https?://", text):
        return last_part(text)
    text = _USER_OF_URL.sub("", text)
    return _IN_A_SENTENCE.sub(lambda found: last_part(found.group()), text)
