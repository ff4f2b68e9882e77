from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageClassification

from hf_mae.models.layers import drop_path
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.models.pos_embed import resize_pos_embed

OUTPUT = {"atol": 5e-6, "rtol": 0}  # float32 on a CPU: the order of sums differs from the official code
LOSS = {"atol": 1e-6, "rtol": 0}
LABELS = torch.tensor([3, 7])


@pytest.fixture
def classifier(tiny):
    """Make a fresh classifier of four blocks, with changes to its configuration."""
    return lambda **changes: MAEForImageClassification(tiny(num_hidden_layers=4, num_labels=5, **changes))


# Parity with the official code


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("pool", "key"), [("mean", "gap"), ("cls", "cls")])
def test_features_logits_and_losses_are_the_official_ones(
    golden, golden_numbers, golden_vit, golden_classifier, attn_implementation, pool, key
):
    model, expected = golden_classifier(pool, attn_implementation), golden_numbers["vit"][key]
    assert_close(model.forward_features(golden["imgs"]), golden_vit[f"{key}.features"], **OUTPUT)
    out = model(golden["imgs"], labels=LABELS)
    # The weights of the golden head are of order 1: logits and losses are several times as large as features.
    assert_close(out.logits, golden_vit[f"{key}.logits"], atol=5e-6, rtol=1e-6)
    assert_close(out.loss.item(), expected["loss_ce"], atol=1e-6, rtol=5e-7)
    soft = model(golden["imgs"], labels=golden_vit["soft_targets"]).loss
    assert_close(soft.item(), expected["loss_soft_target"], atol=1e-6, rtol=5e-7)


@pytest.mark.parametrize(("pool", "key"), [("mean", "gap"), ("cls", "cls")])
def test_weights_have_the_official_names_in_the_official_order(golden_numbers, golden_classifier, pool, key):
    model, expected = golden_classifier(pool), golden_numbers["vit"][key]
    assert list(model.state_dict()) == expected["state_dict_keys"]
    assert model.pos_embed.requires_grad is expected["pos_embed_requires_grad"]


def test_probe_head_is_the_official_one(golden_vit, tiny):
    model = MAEForImageClassification(tiny(head="batchnorm", pool="cls", num_labels=10)).eval()
    names = {"0.running_mean": "running_mean", "0.running_var": "running_var", "1.weight": "weight", "1.bias": "bias"}
    model.head.load_state_dict(
        {ours: golden_vit[f"probe.{theirs}"] for ours, theirs in names.items()}
        | {"0.num_batches_tracked": torch.tensor(3)}
    )
    features = golden_vit["probe.features"]  # of three steps
    assert_close(model.forward_head(features[0]), golden_vit["probe.eval_logits"], **OUTPUT)
    assert not list(model.head[0].parameters())
    whitened = model.train().head[0](features[0])  # batch statistics in training
    assert_close(whitened.mean(dim=0), torch.zeros(48), **OUTPUT)
    assert_close(whitened.std(dim=0, unbiased=False), torch.ones(48), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_logits_are_the_head_of_the_features(golden_classifier, images, pool):
    model = golden_classifier(pool)
    assert torch.equal(model(images).logits, model.forward_head(model.forward_features(images)))
    assert torch.equal(model.forward_features(images, pool), model.forward_features(images))


def test_a_mean_classifier_pools_before_its_norm(golden_classifier, images):
    model = golden_classifier("mean")
    tokens = model(images, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.forward_features(images), model.fc_norm(tokens[:, 1:].mean(dim=1)))
    encoded = model.encode(model.patchify(images), model.pos_embed).last_hidden_state
    assert torch.equal(encoded, tokens)  # there is no other norm


# Initialisation


def built_directly(config, folder):
    return MAEForImageClassification(config)


def built_from_auto_config(config, folder):
    return AutoModelForImageClassification.from_config(config)


def built_on_the_meta_device(config, folder):
    with torch.device("meta"):
        model = MAEForImageClassification(config)
    assert model.head is not None
    model = model.to_empty(device="cpu")
    model.init_weights()
    return model


def loaded_from_an_encoder(config, folder):
    MAEForPreTraining(config).save_pretrained(folder)
    return MAEForImageClassification.from_pretrained(folder)


def built_on_an_encoder(config, folder):
    MAEForPreTraining(config).save_pretrained(folder)
    return MAEForImageClassification.from_encoder(
        folder,
        id2label=config.id2label,
        pool=config.pool,
        head=config.head,
        head_init_std=config.head_init_std,
        drop_path_rate=config.drop_path_rate,
    )


BUILDS = [
    built_directly,
    built_from_auto_config,
    built_on_the_meta_device,
    loaded_from_an_encoder,
    built_on_an_encoder,
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("pool", "head", "std"), [("mean", "linear", 2e-5), ("cls", "batchnorm", 0.01), ("mean", "linear", 0.0)]
)
def test_fresh_heads_have_the_official_statistics(tiny, tmp_path, build, pool, head, std):
    torch.manual_seed(0)
    config = tiny(pool=pool, head=head, head_init_std=std, num_labels=50, drop_path_rate=0.2)
    model = build(config, tmp_path)
    linear = model.head if head == "linear" else model.head[1]
    assert linear.weight.std().item() == pytest.approx(std, rel=0.05)  # of 2400 values
    assert linear.weight.abs().max() <= 6 * std
    assert not linear.bias.any()
    if head == "batchnorm":
        statistics = model.head[0].running_mean.tolist(), model.head[0].running_var.tolist()
        assert (*statistics, int(model.head[0].num_batches_tracked)) == ([0] * 48, [1] * 48, 0)
    if pool == "mean":
        assert bool((model.fc_norm.weight == 1).all() & (model.fc_norm.bias == 0).all())
    qkv = model.blocks[0].attn.qkv.weight
    assert qkv.std().item() == pytest.approx(math.sqrt(2 / (48 + 144)), rel=0.05)  # xavier
    assert model.drop_path_rates == pytest.approx([0, 0, 0.2, 0.2])


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_every_parameter_takes_part_in_the_loss(tiny, images, pos_embed, pool, head):
    # DDP stops at the second step otherwise.
    model = MAEForImageClassification(
        tiny(pos_embed=pos_embed, pool=pool, head=head, head_init_std=1.0, mask_tokens_in_encoder=True)
    )
    model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# Drop path


def test_rates_lie_on_the_official_line(golden_numbers, tiny):
    model = MAEForImageClassification(tiny(num_hidden_layers=12, drop_path_rate=0.1))
    expected = golden_numbers["vit"]["drop_path_depth12_rate0.1"]
    assert model.drop_path_rates == [rate for rate in expected for _ in ("attention", "mlp")]
    assert model.num_drop_path_draws == 24


def test_a_branch_is_kept_from_its_rate_on_and_scaled_to_keep_its_mean():
    noise = torch.tensor([[0.0, 0.0, 0.25, 0.2499], [0.9, 0.1, 0.0, 0.7]])
    first, second = drop_path(noise, [0.0, 0.0, 0.25, 0.25])
    assert first is None
    assert_close(second, torch.tensor([[4 / 3, 0], [0, 4 / 3]]))
    uniforms = (torch.arange(1000) + 0.5)[:, None].expand(-1, 2) / 1000
    assert_close(drop_path(uniforms, [0.3, 0.1])[0].mean(dim=0), torch.ones(2))


def test_each_branch_of_each_sample_is_skipped_or_scaled(golden_classifier, images):
    model = golden_classifier(drop_path_rate=0.5).train()
    tokens = model(images, drop_path_noise=torch.ones(2, 4), output_hidden_states=True).hidden_states
    noise = torch.tensor([[0.0, 0.0, 0.4, 0.6], [0.0, 0.0, 0.6, 0.4]])  # the first block has rate 0
    out = model(images, drop_path_noise=noise, output_hidden_states=True).hidden_states
    block, before = model.blocks[1], tokens[1]
    assert torch.equal(out[1], before)
    assert_close(out[2][0], (before + 2 * block.mlp(block.norm2(before)))[0], **OUTPUT)
    assert_close(out[2][1], (before + 2 * block.attn(block.norm1(before))[0])[1], **OUTPUT)


def test_drop_path_of_a_sample_does_not_depend_on_its_batch(golden_classifier):
    model = golden_classifier(drop_path_rate=0.9).train()
    images, noise = torch.rand(5, 3, 32, 32), torch.rand(5, 4)
    alone = torch.cat([model(images[i : i + 1], drop_path_noise=noise[i : i + 1]).logits for i in range(5)])
    assert_close(model(images, drop_path_noise=noise).logits, alone, **OUTPUT)


def test_drop_path_is_off_in_evaluation_and_draws_for_itself_in_training(golden_classifier, images):
    model, plain = golden_classifier(drop_path_rate=0.5), golden_classifier()(images).logits
    assert torch.equal(model(images, drop_path_noise=torch.zeros(2, 4)).logits, plain)
    model.train()
    torch.manual_seed(5)
    drawn = model(images).logits
    torch.manual_seed(5)
    noise = torch.rand(2, 4)
    assert torch.equal(model(images, drop_path_noise=noise).logits, drawn)
    state = torch.get_rng_state()
    model(images, drop_path_noise=noise)
    assert torch.equal(torch.get_rng_state(), state)  # given noise, nothing is drawn


def test_without_drop_path_training_is_evaluation_and_draws_nothing(golden_classifier, images):
    model, state = golden_classifier(), torch.get_rng_state()
    assert torch.equal(model.train()(images).logits, model.eval()(images).logits)
    assert torch.equal(torch.get_rng_state(), state)


# How it runs


def test_computing_blocks_again_leaves_gradients_equal_under_drop_path(golden_classifier, images):
    gradients = []
    for what in ("none", "gelu", "blocks"):
        model = golden_classifier(drop_path_rate=0.5).train()
        model.checkpoint_activations(what)
        torch.manual_seed(1)
        model(images, labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][name], other[name]) for name in gradients[0])


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch hides it, but not an error
def test_blocks_compile_to_one_graph_each_way(golden_classifier, images):
    torch._dynamo.reset()
    graphs = []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    model, noise = golden_classifier(drop_path_rate=0.5).train(), torch.tensor([[0.0, 0, 0.4, 0.6], [0.0, 0, 0.6, 0.4]])
    expected = model(images, labels=LABELS, drop_path_noise=noise).loss
    for block in model.blocks:
        block.compile(fullgraph=True, backend=count)
    for _ in range(3):
        assert_close(model(images, labels=LABELS, drop_path_noise=noise).loss, expected, **LOSS)
    assert len(graphs) == 2  # without drop path, as in the first block, and with it


def test_the_whole_model_compiles_to_one_graph(golden_classifier, images):
    torch._dynamo.reset()
    model, noise = golden_classifier(drop_path_rate=0.5).train(), torch.rand(2, 4)
    expected = model(images, labels=LABELS, drop_path_noise=noise).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(images, labels=LABELS, drop_path_noise=noise).loss, expected, **LOSS)


@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_bfloat16_keeps_the_loss_in_float32(tiny, images, head):
    torch.manual_seed(0)
    model = MAEForImageClassification(tiny(head=head, head_init_std=0.1, drop_path_rate=0.5, num_labels=10)).train()
    noise = torch.rand(2, 4)
    expected = model(images, labels=LABELS, drop_path_noise=noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(images, labels=LABELS, drop_path_noise=noise, output_hidden_states=True)
    cast = model.to(torch.bfloat16)(images, labels=LABELS, drop_path_noise=noise, output_hidden_states=True)
    assert (autocast.hidden_states[-1].dtype, cast.hidden_states[-1].dtype) == (torch.float32, torch.bfloat16)
    for out in (autocast, cast):
        assert out.loss.dtype is torch.float32
        assert_close(out.loss, expected, atol=3e-2, rtol=0)  # three significant digits of bfloat16 in two blocks


def test_attentions_and_hidden_states_are_passed_on(golden_classifier, images):
    out = golden_classifier("cls", "eager")(images, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(2, 3, 17, 17)] * 2
    assert len(out.hidden_states) == 3
    with pytest.raises(ValueError, match=r"call set_attn_implementation\('eager'\) first"):
        golden_classifier()(images, output_attentions=True)
    assert isinstance(golden_classifier()(images, labels=LABELS, return_dict=False), tuple)


def test_other_sizes_are_read_with_resized_positions(golden_classifier):
    model, pixel_values = golden_classifier(), torch.rand(1, 3, 48, 16)
    with pytest.raises(ValueError, match=r"make 6 x 2 patches, but the model was built for 4 x 4"):
        model(pixel_values)
    expected = model.encode(model.patchify(pixel_values), resize_pos_embed(model.pos_embed, (4, 4), (6, 2)))
    features = model.fc_norm(expected.last_hidden_state[:, 1:].mean(dim=1))
    assert torch.equal(model(pixel_values, interpolate_pos_encoding="bicubic").logits, model.head(features))


def test_inputs_that_do_not_fit_are_refused(golden_classifier, images):
    model = golden_classifier()
    with pytest.raises(
        ValueError, match=r"drop_path_noise of shape \(2, 2\) does not fit; pass \[2, 4\], two uniforms"
    ):
        model(images, drop_path_noise=torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"pool='cls' is not what this classifier was built with, config.pool='mean'"):
        model.forward_features(images, "cls")


# What is trained


def names_under(model, *prefixes):
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("blocks", "prefixes", "rates"),
    [
        (None, ("",), [0.0, 0.1, 0.2, 0.3]),
        (4, ("",), [0.0, 0.1, 0.2, 0.3]),  # all blocks are full fine-tuning, embedding included
        (2, ("blocks.2.", "blocks.3.", "norm.", "fc_norm.", "head."), [0, 0, 0.2, 0.3]),
        (1.0, ("blocks.3.", "norm.", "fc_norm.", "head."), [0, 0, 0, 0.3]),
        (0, ("norm.", "fc_norm.", "head."), [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_last_blocks_are_trained_and_others_have_no_drop_path(classifier, pool, blocks, prefixes, rates):
    model = classifier(pool=pool, drop_path_rate=0.3, pos_embed="learned")
    model.set_trainable(0)  # leaves nothing behind
    model.set_trainable(blocks)
    assert trained(model) == names_under(model, *prefixes)
    assert model.drop_path_rates == pytest.approx([rate for rate in rates for _ in range(2)])


def test_half_a_block_is_its_mlp_with_its_norm(classifier):
    model = classifier(drop_path_rate=0.3)
    model.set_trainable(0.5)
    assert trained(model) == [
        "blocks.3.norm2.weight",
        "blocks.3.norm2.bias",
        "blocks.3.mlp.fc1.weight",
        "blocks.3.mlp.fc1.bias",
        "blocks.3.mlp.fc2.weight",
        "blocks.3.mlp.fc2.bias",
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    ]
    assert model.drop_path_rates == pytest.approx([0] * 7 + [0.3])


def test_the_official_probe_trains_the_linear_layer_alone(classifier):
    model = classifier(head="batchnorm", pool="cls")
    model.set_trainable(0)
    assert trained(model) == ["head.1.weight", "head.1.bias"]
    model.set_trainable(1)
    assert trained(model) == names_under(model, "blocks.3.", "norm.", "head.")


def test_positions_can_be_kept_fixed(classifier):
    model = classifier(pos_embed="learned")
    model.set_trainable(None, freeze_pos_embed=True)
    assert trained(model) == [name for name, _ in model.named_parameters() if name != "pos_embed"]
    model.set_trainable(None)
    assert "pos_embed" in trained(model)
    classifier().set_trainable(None, freeze_pos_embed=True)  # a fixed table is no parameter


def test_frozen_weights_get_no_gradient_and_change_no_number(classifier, images):
    model, labels = classifier(head_init_std=0.1).train(), torch.tensor([0, 4])
    loss = model(images, labels=labels).loss
    model.set_trainable(0.5)
    assert torch.equal(model(images, labels=labels).loss, loss)
    loss = model(images, labels=labels).loss
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == trained(model)


@pytest.mark.parametrize("blocks", [5, -1, 1.5, 0.25])
def test_other_numbers_of_blocks_are_refused(classifier, blocks):
    with pytest.raises(ValueError, match=rf"blocks={blocks} cannot be trained in an encoder of 4 blocks; .*up to 4"):
        classifier().set_trainable(blocks)


# Other classes


@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_resized_heads_keep_the_rows_of_classes_whose_names_stay(tiny, head):
    model = MAEForImageClassification(tiny(head=head, head_init_std=1.0, id2label={0: "cat", 1: "dog", 2: "owl"}))
    linear = model.head if head == "linear" else model.head[1]
    nn.init.uniform_(linear.bias)
    weight, bias, statistics = linear.weight.clone(), linear.bias.clone(), torch.rand(48)
    if head == "batchnorm":
        model.head[0].running_mean.copy_(statistics)
    model.config.head_init_std = 1e-3
    assert model.resize_head({0: "owl", 1: "emu", 2: "cat", 3: "yak"}) == ["owl", "cat"]
    linear = model.head if head == "linear" else model.head[1]
    assert torch.equal(linear.weight[[0, 2]], weight[[2, 0]])
    assert torch.equal(linear.bias, torch.stack([bias[2], torch.tensor(0.0), bias[0], torch.tensor(0.0)]))
    assert 5e-4 < linear.weight[[1, 3]].std() < 2e-3
    assert (model.config.num_labels, model.config.label2id["emu"]) == (4, 1)
    if head == "batchnorm":
        assert torch.equal(model.head[0].running_mean, statistics)


def test_resizing_to_the_same_names_changes_nothing_even_where_two_share_one(tiny, images):
    labels = {0: "crane", 1: "owl", 2: "crane"}  # a bird and a machine, as in ImageNet
    model = MAEForImageClassification(tiny(head_init_std=1.0, id2label=labels)).eval()
    logits = model(images).logits
    assert model.resize_head(labels) == ["crane", "owl", "crane"]
    assert torch.equal(model(images).logits, logits)
    assert model.resize_head({0: "owl", 1: "crane"}) == ["owl", "crane"]
    assert torch.equal(model(images).logits, logits[:, [1, 0]])  # the first of them


def test_resized_heads_stay_frozen_and_in_their_precision(tiny):
    model = MAEForImageClassification(tiny(num_labels=3)).to(torch.bfloat16)
    model.head.requires_grad_(False)
    model.resize_head({0: "a", 1: "b"})
    assert (model.head.weight.dtype, model.head.weight.requires_grad) == (torch.bfloat16, False)


@pytest.mark.parametrize("labels", [{}, {1: "a", 2: "b"}, {0: "a", 2: "b"}])
def test_ids_with_gaps_are_refused(tiny, labels):
    with pytest.raises(ValueError, match=r"id2label has the ids (none|1, 2|0, 2); name the classes 0 to n - 1"):
        MAEForImageClassification(tiny()).resize_head(labels)
