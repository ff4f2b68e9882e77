"""Nothing of a machine is published: paths are cut by the field they stand in, whatever characters they have."""

from __future__ import annotations

import pytest

from hf_mae.cards.private import last_part, published, without_path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/home/jane doe/secret data/x", "x"),
        ("C:\\Users\\Jane Doe\\data", "data"),
        ("~/my data/pics", "pics"),
        ("file:///home/jane/x", "x"),
        ("\\\\server\\share\\jane", "jane"),
        ("runs/a b/c", "c"),
        ("runs/a/checkpoints/step_00000010/model", "model"),
        ("s3://key:pass@b/x?X-Amz-Signature=1", "x"),
        ("digits", "digits"),
    ],
)
@pytest.mark.parametrize("field", ["path", "out", "init_from", "splits", "resume", "model"])
def test_fields_that_hold_paths_keep_the_last_part(field: str, before: str, after: str):
    assert published({"data": {field: before}}) == {"data": {field: after}}
    assert published({field: [before]}) == {field: [after]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/home/ada/x/photos", "photos"),
        ("/home/jane doe/secret data/x", "x"),
        ("C:\\Users\\ada\\photos", "photos"),
        ("~/my data/pics", "pics"),
        ("s3://key:pass@b/x", "x"),
        ("read from /home/ada/x/photos today", "read from photos today"),
        ("read from C:\\Users\\ada\\photos, and more", "read from photos, and more"),
        ("see https://user:secret@example.org/x", "see https://example.org/x"),
        ("ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k"),
        ("64 images/s", "64 images/s"),
        ("rand-m9-mstd0.5", "rand-m9-mstd0.5"),
    ],
)
def test_elsewhere_what_looks_like_a_path_is_cut(before: str, after: str):
    assert without_path(before) == after
    assert published({"note": before, "pids": [1], "hostname": "h"}) == {"note": after}


def test_what_is_no_path_stays():
    assert published({"splits": "stratified:90/10@3334"}) == {"splits": "stratified:90/10@3334"}
    assert published({"classes": ["/m/01/abc"], "answers": [{"label": "a/b"}]}) == {
        "classes": ["/m/01/abc"],
        "answers": [{"label": "a/b"}],
    }
    assert published({"path": "ada/animals"}, keep={"ada/animals"}) == {"path": "ada/animals"}
    assert published({"path": "ada/animals"}) == {"path": "animals"}


def test_platform_names_the_system_only():
    assert published({"platform": "Linux-6.1-janes-kernel-x86_64"}) == {"platform": "Linux"}


def test_a_path_that_ends_in_separators_has_a_last_part():
    assert last_part("/home/ada/x//") == "x"
