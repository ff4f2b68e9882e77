"""Usage lines are executed as they stand, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hf_mae.cards.usage import run_usage, usage_blocks

CARD = """# T

## Usage

text

```python
{one}
```

```python
{two}
```

## Results

```python
no = 1
```
"""


def test_blocks_are_those_under_the_heading():
    assert usage_blocks(CARD.format(one="a = 1", two="b = 2")) == ["a = 1\n", "b = 2\n"]
    assert usage_blocks("# T\n") == []


def test_blocks_see_the_folder_under_the_name_of_the_repository(tmp_path: Path):
    (tmp_path / "note.txt").write_text("hello")
    Image.new("RGBA", (5, 4)).save(tmp_path / "mine.png")
    one = 'print(open("org/name/note.txt").read())'
    two = 'from PIL import Image\np = Image.open("picture.jpg")\nprint(p.size, p.mode)'
    done = run_usage(CARD.format(one=one, two=two), tmp_path, "org/name", picture=tmp_path / "mine.png")
    assert [block["output"] for block in done["blocks"]] == ["hello", "(5, 4) RGB"]
    assert done["mode"] == "folder"
    assert all(len(block["sha256"]) == 64 for block in done["blocks"])


def test_ids_that_no_folder_can_stand_for_are_substituted_and_told(tmp_path: Path):
    one = 'print("hf-hub:org/name")'
    two = 'hf_hub_download = None\npath = hf_hub_download("org/name", "onnx/model.onnx")\nprint(path)'
    done = run_usage(CARD.format(one=one, two=two), tmp_path, "org/name")
    assert [block["output"] for block in done["blocks"]] == ["local-dir:org/name", "org/name/onnx/model.onnx"]
    assert done["blocks"][0]["substituted"] == ['print("hf-hub:org/name") -> print("local-dir:org/name")']


def test_failing_block_is_named_with_the_end_of_its_output(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"(?s)usage block 2 .*ZeroDivisionError"):
        run_usage(CARD.format(one="a = 1", two="1 / 0"), tmp_path, "org/name")


def test_block_may_not_import_us_without_saying_so(tmp_path: Path):
    loads = 'import sys\nsys.modules["hf_mae"] = sys'  # as an import would, without its seconds
    with pytest.raises(RuntimeError, match="without saying so"):
        run_usage(CARD.format(one=loads, two="a = 1"), tmp_path, "org/name")
    run_usage(CARD.format(one=f"{loads}\nimport hf_mae", two="a = 1"), tmp_path, "org/name")


def test_token_and_place_are_in_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    one = 'import os\nprint(os.environ.get("HF_TOKEN"), os.getcwd(), os.path.realpath("org/name"))'
    before = run_usage(CARD.format(one=one, two="a = 1"), tmp_path, "org/name")
    assert before["blocks"][0]["output"] == "None . (folder)"
    after = run_usage(CARD.format(one=one.replace(', os.path.realpath("org/name")', ""), two="a = 1"), None, "org/name")
    assert after["blocks"][0]["output"] == "(token) ."
    assert after["mode"] == "hub"


def test_card_without_blocks_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no ```python block"):
        run_usage("# T\n", tmp_path, "org/name")
