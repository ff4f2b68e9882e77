"""Opens Hub data sets against the loopback server; run in a process of its own, as the endpoint is read at import.

usage: hub_script.py FOLDER; prints "ok CASE" for each case that passes.
"""

# ruff: noqa: E402 (the environment has to be set before huggingface_hub is imported)

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "hub"), str(Path(__file__).parent)]

from server import HubServer

hub = HubServer()
os.environ.update(hub.env())
os.environ["HF_HUB_OFFLINE"] = "0"

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from samples import rows_of, write_folder, write_parquet, write_tar

from hf_mae.data import formats
from hf_mae.data.formats import ParquetSource
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order
from hf_mae.data.sources import list_splits, open_source
from hf_mae.recipes.base import Augment, Data

api = HfApi(endpoint=hub.url, token="hf_alice_write")
folder = Path(sys.argv[1])


def publish(repo: str, local: Path) -> str:
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=local)
    return str(api.dataset_info(repo).sha)


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def since(start: int) -> list[dict]:
    time.sleep(0.1)  # a request is logged just after it was answered
    return [request for request in hub.log[start:] if request["m"] == "GET"]


def parquet_case(name: str) -> Data:
    # Rows of all files are larger than the 64 kB that a footer is read with.
    write_parquet(folder / name / "train-0.parquet", range(120), groups=40)
    write_parquet(folder / name / "train-1.parquet", range(120, 240), groups=40)
    write_parquet(folder / name / "test-0.parquet", range(300, 310))
    publish(f"org/{name}", folder / name)
    return Data(path=f"org/{name}")


def stream() -> None:
    """Parquet by ranges: the rows of the local files, two requests a chunk, exactly their bytes."""
    formats.REMOTE_CHUNK_ROWS = 80
    data = parquet_case("p")
    sha = api.dataset_info("org/p").sha
    assert list_splits(data) == ["train", "test"], list_splits(data)
    source = open_source(data)
    assert isinstance(source, ParquetSource)
    assert source.revision == sha
    assert str(sha) in source.summary()
    assert source.label_names == ["a", "b", "c"]
    assert source.sizes.tolist() == [80, 40, 80, 40], source.sizes  # neighbouring groups are merged
    assert source.describe(3, 5) == ("train-1.parquet", 85)
    local = open_source(Data(path=str(folder / "p")))
    assert rows_of(source) == rows_of(local)
    assert source.fingerprint != local.fingerprint

    for chunk, groups in ((0, (0, 1)), (1, (2,))):
        start = len(hub.log)
        source.read(chunk)
        requests = since(start)
        assert len(requests) == 2, requests
        # The server notes a request after it has answered, so the client may be at the second by then.
        resolve, fetch = sorted(requests, key=lambda r: "/resolve/" not in r["path"])
        assert "/resolve/" in resolve["path"]
        assert f"/{sha}/" in resolve["path"], resolve
        meta = pq.read_metadata(folder / "p/train-0.parquet")
        spans = []
        for g in groups:
            for i in range(meta.num_columns):
                column = meta.row_group(g).column(i)
                if column.path_in_schema in ("image.bytes", "label"):
                    begin = column.dictionary_page_offset or column.data_page_offset
                    spans.append((begin, begin + column.total_compressed_size))
        wanted = f"bytes={min(a for a, _ in spans)}-{max(b for _, b in spans) - 1}"
        assert fetch["range"] == wanted, (fetch["range"], wanted)

    # The revision stays pinned while the branch moves on.
    write_parquet(folder / "q/train-0.parquet", range(7))
    publish("org/p", folder / "q")
    assert open_source(replace(data, revision=str(sha))).fingerprint == source.fingerprint
    assert open_source(data).fingerprint != source.fingerprint
    api.delete_file("test-0.parquet", "org/p", repo_type="dataset")
    pinned = replace(data, revision=source.revision)
    assert list_splits(data) == ["train"], list_splits(data)
    assert list_splits(pinned) == ["train", "test"]
    test = open_source(pinned, "test")
    assert test.revision == sha
    assert rows_of(test) == rows_of(open_source(Data(path=str(folder / "p")), "test"))
    message = error_of(lambda: open_source(pinned, "dev", field="evals.split"))
    assert "ValueError: evals.split='dev' is not a split of org/p; it has train, test" in message, message
    assert rows_of(source) == rows_of(local)
    downloaded = open_source(replace(data, revision=str(sha), streaming=False))
    assert rows_of(downloaded) == rows_of(local)
    assert downloaded.fingerprint == local.fingerprint


def faults() -> None:
    """A bad network costs time, not rows; a file that is gone is named."""
    formats.RETRY_SECONDS = (0.05, 0.1, 0.1, 0.1)
    formats.REMOTE_CHUNK_ROWS = 40
    source = open_source(parquet_case("faulty"))
    local = open_source(Data(path=str(folder / "faulty")))

    def batches(of):
        order = Order(of.sizes, 0, 4, 1)
        with Loader(
            of, order, augment=Augment(), image_size=(8, 8), channels=3, global_batch=30, stop=8, readers=1
        ) as loader:
            return [(b.positions.tolist(), b.pixel_values.numpy().tobytes(), b.labels.tolist()) for b in loader]

    expected = batches(local)
    assert batches(source) == expected
    for where, fault in (
        (r"/_store/", {"status": 503, "times": 1}),
        (r"/resolve/", {"status": 429, "times": 1, "headers": {"Retry-After": "1"}}),
        (r"/_store/", {"status": 403, "times": 1}),  # an expired signature
        (r"/_store/", {"cut": 1000, "times": 1}),
    ):
        injected = hub.fault("GET", where, skip=1, **fault)
        assert batches(source) == expected, fault
        assert injected["hits"] == fault["times"], fault

    gone = hub.fault("GET", r"/resolve/.*train-1", status=404, times=99)
    message = error_of(lambda: batches(source))
    assert "RuntimeError: could not read train-1.parquet, row group" in message, message
    gone["times"] = 0
    refused = hub.fault("GET", r"/_store/", status=403, times=99)
    message = error_of(lambda: source.read(1))
    assert "could not read train-0.parquet, row group 1" in message, message
    assert "403" in message, message
    refused["times"] = 0


def downloads() -> None:
    """Tars and image folders are fetched once; other formats need an Arrow copy; labels and splits are found."""
    write_tar(folder / "t/train-0.tar", range(9))
    write_tar(folder / "t/test-0.tar", range(20, 23))
    sha = publish("org/t", folder / "t")
    data = Data(path="org/t")
    source = open_source(data)
    assert rows_of(source) == rows_of(open_source(Data(path=str(folder / "t"))))
    assert source.revision == sha
    assert "downloaded to the Hub cache" in source.summary()
    assert source.fingerprint == open_source(Data(path=str(folder / "t"))).fingerprint
    start = len(hub.log)
    rows_of(open_source(data))
    assert not [r for r in since(start) if r["port"] == "store"], "fetched twice"

    write_folder(folder / "f/train", range(9))
    write_folder(folder / "f/test", range(9, 12))
    publish("org/f", folder / "f")
    source = open_source(Data(path="org/f"))
    assert rows_of(source) == rows_of(open_source(Data(path=str(folder / "f"))))
    assert source.label_names == ["class0", "class1", "class2"]
    assert list_splits(Data(path="org/f")) == ["train", "test"]
    write_folder(folder / "g/images/train", range(9))
    write_folder(folder / "g/images/test", (1, 4))  # of class1 only
    publish("org/g", folder / "g")
    source = open_source(Data(path="org/g"), "test")
    assert source.label_names == ["class0", "class1", "class2"]
    assert [label for _, label in rows_of(source)] == [1, 1]

    write_folder(folder / "h/train", range(9))  # as patients: the folders are not the label
    write_folder(folder / "h/test", range(9, 12))
    for split, numbers in (("train", range(9)), ("test", range(9, 12))):
        rows = [f"class{i % 3}/{i:04d}.JPG,{'ill' if i % 2 else 'well'}" for i in numbers]
        (folder / f"h/{split}/metadata.csv").write_text("\n".join(["file_name,label", *rows, ""]))
    publish("org/h", folder / "h")
    for split in ("train", "test"):
        source, local = open_source(Data(path="org/h"), split), open_source(Data(path=str(folder / "h")), split)
        assert source.label_names == local.label_names == ["ill", "well"]
        assert rows_of(source) == rows_of(local)
        assert source.fingerprint == local.fingerprint
        assert "train/metadata.csv" in source.summary()
    assert rows_of(open_source(Data(path="org/h", label_column="none"))) == [
        (image, -1) for image, _ in rows_of(open_source(Data(path=str(folder / "h"))))
    ]

    (folder / "i").mkdir()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 4, kind)
    pq.write_table(pa.table({"image": images}), folder / "i/train.parquet")
    publish("org/i", folder / "i")
    for streaming in (True, False):
        message = error_of(lambda streaming=streaming: open_source(Data(path="org/i", streaming=streaming)))
        assert message.startswith("ValueError: "), message
        assert "downloaded rows name are not read" in message, message

    (folder / "c").mkdir()
    (folder / "c/rows.csv").write_text("image,label\nx,1\n")
    publish("org/c", folder / "c")
    message = error_of(lambda: open_source(Data(path="org/c")))
    assert "csv files (.csv) cannot be read in random order; pass --data.no-streaming" in message, message
    message = error_of(lambda: open_source(Data(path="org/c", streaming=False)))
    assert "no column is clearly one of encoded images: image (" in message, message


def mistakes() -> None:
    """What cannot be opened says why, in one error, before anything is read."""
    message = error_of(lambda: open_source(Data(path="org/nothing")))
    assert message.startswith("ValueError: data.path='org/nothing' is neither a folder or file (looked for"), message
    assert list_splits(Data(path="org/nothing")) == []
    data = parquet_case("m")
    message = error_of(lambda: open_source(replace(data, revision="nope")))
    assert message.startswith("ValueError: "), message
    assert "nope" in message, message
    message = error_of(lambda: open_source(replace(data, split="dev")))
    assert "data.split='dev' is not a split of org/m; it has train, test" in message, message
    message = error_of(lambda: open_source(replace(data, image_column="x")))
    assert "data.image_column='x' is not a column; the columns are image (image), label (int64)" in message, message
    message = error_of(lambda: open_source(replace(data, name="big")))
    assert "data.name='big'" in message, message
    assert "default" in message, message

    (folder / "s").mkdir()
    (folder / "s/s.py").write_text("raise SystemExit('ran remote code')\n")
    publish("org/s", folder / "s")
    message = error_of(lambda: open_source(Data(path="org/s")))
    assert "remote code is never run" in message, message
    (folder / "e").mkdir()
    (folder / "e/README.md").write_text("nothing\n")
    publish("org/e", folder / "e")
    message = error_of(lambda: open_source(Data(path="org/e")))
    assert message.startswith("ValueError: data.path='org/e' holds no data files"), message

    hub.repos["dataset", "org/m"].gated = "auto"
    os.environ["HF_TOKEN"] = "hf_bob_read"
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    message = error_of(lambda: open_source(replace(data)))
    assert "hf auth login" in message, message


for case in (stream, faults, downloads, mistakes):
    try:
        case()
        print("ok", case.__name__)
    except Exception:
        traceback.print_exc()
hub.close()
