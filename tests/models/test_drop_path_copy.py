"""The rates of stochastic depth lie beside the images: a forward pass on a GPU copies nothing and waits for nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.models.layers import drop_path
from hf_mae.models.timm_models import PlannedDropPath

CONFIG = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "drop_path_rate": 0.3, "num_labels": 3,
}  # fmt: skip


class CopiesFromTheHost(TorchDispatchMode):
    """Notes operations that read a tensor of the host and make one of the GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kinds = [
            {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.ndim}
            for values in ((args, kwargs), out)
        ]
        if "cpu" in kinds[0] and "cuda" in kinds[1]:
            self.seen.append(str(func))
        return out


def copies(run):
    with FakeTensorMode(allow_non_fake_inputs=True), CopiesFromTheHost() as mode:
        run()
    return mode.seen


def test_a_training_forward_pass_copies_nothing_to_the_gpu():
    model = MAEForImageClassification(MAEConfig(**CONFIG)).train()
    with FakeTensorMode():
        for module in model.modules():  # `.to("cuda")` swaps no fake tensors
            for tensors in (module._parameters, module._buffers):
                for name, there in tensors.items():
                    if there is not None:
                        empty = torch.empty(there.shape, dtype=there.dtype, device="cuda")
                        tensors[name] = torch.nn.Parameter(empty) if tensors is module._parameters else empty
        pixels, noise = torch.rand(4, 3, 16, 16, device="cuda"), torch.rand(4, 6, device="cuda")
        with CopiesFromTheHost() as mode:
            model(pixels, drop_path_noise=noise)
    assert mode.seen == []


def test_the_sensor_sees_a_copy_and_layers_of_timm_make_none():
    assert copies(lambda: drop_path(torch.rand(4, 6, device="cuda"), [0.1] * 6)) != []

    def planned():
        layer = PlannedDropPath(0.3)
        layer.draws = torch.rand(4, device="cuda")
        layer(torch.rand(4, 5, device="cuda"))

    assert copies(planned) == []


def branches(model, noise):
    return torch.cat([scale for scale in drop_path(noise, model.drop_path_rates) if scale is not None])


def forwarded(model, noise):
    bits = model.drop_path_bits.view(torch.float32)
    return torch.cat([scale for scale in drop_path(noise, model.drop_path_rates, bits) if scale is not None])


@pytest.mark.parametrize("how", ["made", "frozen", "set", "loaded", "copied", "half", "meta"])
def test_the_rates_on_the_device_have_the_bits_of_the_list(tmp_path, how):
    torch.manual_seed(0)
    model = MAEForImageClassification(MAEConfig(**CONFIG))
    if how == "frozen":
        model.set_trainable(1)
    if how == "set":
        model.drop_path_rates = [0.0, 0.0, 0.5, 0.5, 0.1, 0.1]
    if how == "loaded":  # by way of the meta device
        model.save_pretrained(tmp_path)
        model = MAEForImageClassification.from_pretrained(tmp_path)
    if how == "copied":
        model = copy.deepcopy(model)
    if how == "half":
        model = model.bfloat16()
    if how == "meta":
        with torch.device("meta"):
            model = MAEForImageClassification(MAEConfig(**CONFIG))
        model.to_empty(device="cpu")
        model.init_weights()
    noise = torch.rand(64, 6)
    assert torch.equal(forwarded(model, noise), branches(model, noise))
    assert not any("drop_path" in name for name in model.state_dict())


def test_the_forward_pass_with_drop_path_is_one_graph():
    torch._dynamo.reset()
    model = MAEForImageClassification(MAEConfig(**CONFIG)).train()
    graphs = []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    pixels, noise = torch.rand(4, 3, 16, 16), torch.rand(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend=count)
    expected = model(pixels, drop_path_noise=noise).logits
    torch.testing.assert_close(compiled(pixels, drop_path_noise=noise).logits, expected)
    assert len(graphs) == 1
