"""Uploads by xet, the default of the stock client: its own chunks, deduplicated, and rebuilt to the same bytes."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from tests.hub.conftest import absent, clean_environment
from tests.hub.server import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

UPLOAD = """
import json
from pathlib import Path
import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from safetensors.numpy import load_file, save_file

def stored():
    return sum(path.stat().st_size for path in Path(CAS).rglob("*") if path.is_file())

api, sizes = HfApi(), []
weights = {"w": np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)}
for turn in range(2):
    save_file(weights, "model.safetensors")
    before = stored()
    api.create_repo("org/big", exist_ok=True)
    api.upload_file(path_or_fileobj="model.safetensors", path_in_repo="model.safetensors", repo_id="org/big")
    sizes.append(stored() - before)
    weights["w"][1_500_000] += 1
back = hf_hub_download("org/big", "model.safetensors")
assert Path(back).read_bytes() == Path("model.safetensors").read_bytes()
print(json.dumps(sizes))
"""


def test_a_changed_weight_costs_a_chunk_and_comes_back_bit_for_bit(tmp_path, run_client):
    if find_spec("hf_xet") is None:
        absent("needs hf_xet")
    with HubServer(xet=True) as hub:
        env = clean_environment(hub, tmp_path / "hf_home")
        first, second = json.loads(run_client(f"CAS = {str(hub.root / 'cas')!r}" + UPLOAD, env))
        assert first > 10_000_000, "12 MB of random numbers are stored once"
        assert second < 1_000_000, "one changed number: its chunk, not the file"
        routes = [row["path"] for row in hub.log]
        assert any("xet-write-token" in path for path in routes)
        assert not [path for path in routes if "/_store/" in path or "objects/batch" in path], "not the LFS way"
        # Without xet the same file comes by HTTP, with the same bytes.
        plain = env | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "other")}
        code = "from huggingface_hub import *; import hashlib; p = hf_hub_download('org/big', 'model.safetensors')\n"
        code += "print(hashlib.sha256(open(p, 'rb').read()).hexdigest())"
        digest = run_client(code, plain).strip()
        assert hub.repos["model", "org/big"].commits
        assert hub.resolve(hub.repos["model", "org/big"], "main").tree["model.safetensors"].sha256 == digest
        assert any("/_store/get" in row["path"] for row in hub.log)
