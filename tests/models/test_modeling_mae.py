from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForPreTraining

from hf_mae.models.masking import num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.models.pos_embed import sincos_pos_embed

OUTPUT = {"atol": 5e-6, "rtol": 0}  # float32 on a CPU: the order of sums differs from the official code
LOSS = {"atol": 1e-6, "rtol": 0}


# Parity with the official code


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("norm", "key"), [(False, "raw"), (True, "norm")])
def test_loss_outputs_and_gradients_are_the_official_ones(
    golden, golden_numbers, golden_model, attn_implementation, norm, key
):
    model = golden_model(attn_implementation, norm_pix_loss=norm)
    out = model(golden["imgs"], noise=golden["noise"])
    assert torch.equal(out.mask, golden["mask"])
    assert torch.equal(out.ids_restore, golden["ids_restore"])
    assert_close(out.latent, golden["latent"], **OUTPUT)
    assert_close(out.pred, golden["pred"], **OUTPUT)
    assert_close(out.loss.item(), golden_numbers["mae"][f"loss_{key}"], **LOSS)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm_of_all = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert_close(norm_of_all, golden_numbers["mae"][f"grad_norm_{key}"], **LOSS)
    for name, expected in golden.items():
        if name.startswith(f"grad_{key}."):
            assert_close(gradients[name.removeprefix(f"grad_{key}.")], expected, atol=1e-7, rtol=0)  # norm is about 1


@pytest.mark.parametrize("ratio", ["0.0625", "0.3", "0.5", "0.6", "0.9"])
def test_other_mask_ratios_keep_and_lose_as_the_official_code(golden, golden_numbers, golden_model, ratio):
    expected = golden_numbers["mae"]["other_mask_ratios"][ratio]
    out = golden_model(mask_ratio=float(ratio), norm_pix_loss=True)(golden["imgs"], noise=golden["noise"])
    assert int((1 - out.mask).sum(dim=1)[0]) == expected["kept"] == out.latent.shape[1] - 1
    assert_close(out.loss.item(), expected["loss_norm"], **LOSS)


def test_gathering_before_embedding_equals_embedding_with_the_convolution(golden_model, images):
    model = golden_model()
    expected = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    assert_close(model.patch_embed(model.patchify(images)), expected, **OUTPUT)


# Initialisation


def xavier_bounds(model: nn.Module) -> dict[str, float]:
    return {
        name: math.sqrt(6 / (p.shape[0] + p[0].numel()))
        for name, p in model.named_parameters()
        if p.ndim >= 2 and name.endswith("weight")
    }


def built_directly(config):
    return MAEForPreTraining(config)


def built_from_auto_config(config):
    return AutoModelForPreTraining.from_config(config)


def built_on_the_meta_device(config):
    with torch.device("meta"):
        model = MAEForPreTraining(config)
    assert model.pos_embed.is_meta
    model = model.to_empty(device="cpu")
    model.init_weights()
    return model


@pytest.mark.parametrize("build", [built_directly, built_from_auto_config, built_on_the_meta_device])
def test_fresh_weights_have_the_papers_statistics(tiny, golden_numbers, build):
    torch.manual_seed(0)
    model = build(tiny())
    bounds = xavier_bounds(model)
    official = golden_numbers["mae"]["xavier_bounds"]
    assert {name: bounds[name] for name in official} == pytest.approx(official)
    for name, parameter in model.named_parameters():
        largest, std = parameter.abs().max().item(), parameter.std().item()
        if name in bounds:  # uniform in [-bound, bound]
            assert 0.97 * bounds[name] < largest <= bounds[name], name
            assert std == pytest.approx(bounds[name] / math.sqrt(3), rel=0.05), name
        elif name in ("cls_token", "mask_token"):  # N(0, 0.02), 48 and 32 values
            assert 0.013 < std < 0.027, name
        elif name == "patch_embed.proj.bias":  # PyTorch's own, uniform in 1 / sqrt(fan_in)
            assert 0.05 < largest <= 1 / math.sqrt(3 * 8 * 8)
        elif (
            name.endswith("norm1.weight")
            or name.endswith("norm2.weight")
            or name in ("norm.weight", "decoder_norm.weight")
        ):
            assert bool((parameter == 1).all()), name
        else:
            assert largest == 0, name
    assert torch.equal(model.pos_embed[0], sincos_pos_embed(48, (4, 4)))
    assert torch.equal(model.decoder_pos_embed[0], sincos_pos_embed(32, (4, 4)))


def test_fixed_positions_are_saved_but_not_trained(tiny):
    model = MAEForPreTraining(tiny())
    assert {"pos_embed", "decoder_pos_embed"} <= set(model.state_dict())
    assert not {"pos_embed", "decoder_pos_embed"} & {name for name, _ in model.named_parameters()}
    assert not model.pos_embed.requires_grad


def test_learned_positions_are_trained(tiny, images, noise):
    model = MAEForPreTraining(tiny(pos_embed="learned"))
    assert 0.017 < model.pos_embed.std().item() < 0.023
    out = model(images, noise=noise)
    out.loss.backward()
    seen = torch.cat([torch.ones(1), 1 - out.mask.prod(dim=0)])  # the cls token, and patches that some sample keeps
    assert torch.equal((model.pos_embed.grad.abs().sum(dim=(0, 2)) > 0).float(), seen)
    assert bool((model.decoder_pos_embed.grad.abs().sum(dim=(0, 2)) > 0).all())


@pytest.mark.parametrize("changes", [{}, {"pos_embed": "learned"}, {"mask_tokens_in_encoder": True}])
def test_every_parameter_takes_part_in_the_loss(tiny, images, noise, changes):
    # DDP stops at the second step otherwise.
    model = MAEForPreTraining(tiny(**changes))
    model(images, noise=noise).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_masked_patches_of_a_fresh_model_get_different_predictions(tiny, images, noise):
    # Position-blind decoders (transformers 5.x from scratch) predict one and the same patch everywhere.
    torch.manual_seed(0)
    out = MAEForPreTraining(tiny()).eval()(images, noise=noise)
    assert out.pred[0][out.mask[0] == 1].std(dim=0).mean() > 0.01


# What forward returns


def test_encoder_does_not_mask_unless_given_noise(golden_model, tmp_path, images, noise):
    golden_model().save_pretrained(tmp_path)
    encoder = MAEModel.from_pretrained(tmp_path)
    whole, masked = encoder(images), encoder(images, noise=noise)
    assert whole.last_hidden_state.shape == (2, 17, 48)
    assert whole.mask is None
    assert masked.last_hidden_state.shape == (2, 5, 48)
    assert torch.equal(encoder(images).last_hidden_state, whole.last_hidden_state)
    assert_close(masked.last_hidden_state, golden_model()(images, noise=noise).latent, atol=0, rtol=0)


def test_pred_is_left_out_in_training_unless_asked(tiny, images, noise):
    model = MAEForPreTraining(tiny())
    assert model.train()(images, noise=noise).pred is None
    assert model(images, noise=noise, return_pred=True).pred.shape == (2, 16, 192)
    assert model.eval()(images, noise=noise).pred.shape == (2, 16, 192)
    assert model(images, noise=noise, return_pred=False).pred is None


def test_return_pred_does_not_change_the_loss(tiny, images, noise):
    model = MAEForPreTraining(tiny())
    assert torch.equal(model(images, noise=noise).loss, model(images, noise=noise, return_pred=True).loss)


@pytest.mark.parametrize(("strategy", "ratio"), [("random", 0.75), ("block", 0.5), ("grid", 0.75)])
def test_noise_is_drawn_from_the_global_generator_for_the_strategy(tiny, images, strategy, ratio):
    model = MAEForPreTraining(tiny(mask_strategy=strategy, mask_ratio=ratio)).eval()
    torch.manual_seed(3)
    first = model(images)
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.rand(2, num_uniforms(strategy, (4, 4)))
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(3)
    assert torch.equal(model(images).mask, first.mask)
    assert first.mask.sum(dim=1).tolist() == [16 * ratio] * 2


def test_hidden_states_begin_with_the_embedding_and_precede_the_norm(golden_model, images, noise):
    model = golden_model()
    out = model(images, noise=noise, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.norm(out.hidden_states[-1]), out.latent)
    assert torch.equal(model.blocks[0](out.hidden_states[0])[0], out.hidden_states[1])


def test_attentions_are_distributions_and_need_eager(golden_model, images):
    model = golden_model("eager")
    attentions = model(images, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 3, 5, 5)] * 2
    assert_close(attentions[0].sum(dim=-1), torch.ones(2, 3, 5), **OUTPUT)
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa' does not compute; call set_attn_implementation"):
        golden_model("sdpa")(images, output_attentions=True)


def test_return_dict_false_gives_a_tuple(golden_model, images, noise):
    out = golden_model()(images, noise=noise, return_dict=False)
    assert isinstance(out, tuple)
    assert out[0].ndim == 0


def test_features_pool_the_unmasked_encoder(golden_model, images):
    model = golden_model()
    tokens = model.encode(model.patchify(images), model.pos_embed).last_hidden_state
    assert torch.equal(model.forward_features(images), tokens[:, 1:].mean(dim=1))
    assert torch.equal(model.forward_features(images, pool="cls"), tokens[:, 0])
    with pytest.raises(ValueError, match=r"pool='max' is unknown; use 'mean' or 'cls'"):
        model.forward_features(images, pool="max")


# Properties


def test_only_visible_patches_reach_the_encoder(golden_model, images, noise):
    model = golden_model()
    out = model(images, noise=noise)
    hidden = model.unpatchify(out.mask[..., None].expand(-1, -1, 192))
    changed = model(torch.where(hidden.bool(), torch.rand_like(images), images), noise=noise)
    assert torch.equal(changed.pred, out.pred)
    assert not torch.equal(changed.loss, out.loss)


def test_loss_counts_removed_patches_only(golden_model, images, noise):
    model = golden_model(norm_pix_loss=False)
    out = model(images, noise=noise)
    error = ((out.pred - model.patchify(images)) ** 2).mean(dim=-1)
    assert_close(out.loss, error[out.mask == 1].mean(), **LOSS)


def test_mask_tokens_in_the_encoder_see_every_position(tiny, images, noise):
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny(mask_tokens_in_encoder=True)).eval()
    out = model(images, noise=noise)
    assert out.latent.shape == (2, 17, 48)
    assert not hasattr(model, "mask_token")
    with torch.no_grad():
        model.encoder_mask_token.add_(1)
    assert not torch.allclose(model(images, noise=noise).pred, out.pred)
    hidden = model.unpatchify(out.mask[..., None].expand(-1, -1, 192)).bool()
    unseen = model(torch.where(hidden, torch.rand_like(images), images), noise=noise)
    assert torch.equal(unseen.pred, model(images, noise=noise).pred)


@pytest.mark.parametrize("channels", [1, 4])
def test_non_square_images_of_other_channels_train(tiny, channels):
    model = MAEForPreTraining(tiny(image_size=(16, 48), patch_size=(8, 16), num_channels=channels))
    pixel_values = torch.rand(2, channels, 16, 48)
    out = model(pixel_values, return_pred=True)
    assert out.pred.shape == (2, 6, 8 * 16 * channels)
    assert torch.equal(model.unpatchify(model.patchify(pixel_values)), pixel_values)
    assert torch.equal(model.pos_embed[0], sincos_pos_embed(48, (2, 3)))
    out.loss.backward()


@pytest.mark.parametrize("how", ["bicubic", "sincos"])
def test_other_sizes_are_read_with_resized_positions_in_encoder_and_decoder(golden_model, how):
    model = golden_model()
    pixel_values = torch.rand(1, 3, 48, 16)
    with pytest.raises(ValueError, match=r"make 6 x 2 patches, but the model was built for 4 x 4"):
        model(pixel_values)
    out = model(pixel_values, noise=torch.arange(12.0)[None], interpolate_pos_encoding=how)
    assert out.pred.shape == (1, 12, 192)
    assert model.forward_features(pixel_values, interpolate_pos_encoding=how).shape == (1, 48)


def test_sincos_at_another_size_equals_a_model_built_for_it(golden_model, tiny, official_weights):
    built = MAEForPreTraining(tiny(image_size=(48, 16))).eval()
    fixed = ("pos_embed", "decoder_pos_embed")
    built.load_state_dict(
        {k: v for k, v in official_weights.items() if k not in fixed} | {k: getattr(built, k) for k in fixed}
    )
    pixel_values, noise = torch.rand(1, 3, 48, 16), torch.rand(1, 12)
    resized = golden_model()(pixel_values, noise=noise, interpolate_pos_encoding="sincos")
    assert torch.equal(resized.pred, built(pixel_values, noise=noise).pred)


# Execution


def test_eager_and_sdpa_agree_and_the_switch_reaches_the_decoder(golden_model, images, noise):
    model = golden_model("eager")
    eager = model(images, noise=noise)
    model.set_attn_implementation("sdpa")
    assert {block.attn.config._attn_implementation for block in [*model.blocks, *model.decoder_blocks]} == {"sdpa"}
    sdpa = model(images, noise=noise)
    assert_close(sdpa.pred, eager.pred, **OUTPUT)
    assert_close(sdpa.loss, eager.loss, **LOSS)


@pytest.mark.parametrize("keyword", [{}, {"return_pred": True}])
def test_compiles_to_one_graph_when_noise_is_given(golden_model, images, noise, keyword):
    graphs = []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    model = golden_model().train()
    expected = model(images, noise=noise, **keyword).loss
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for _ in range(2):
        assert_close(compiled(images, noise=noise, **keyword).loss, expected, **LOSS)
    assert len(graphs) == 1


@pytest.mark.parametrize(("what", "again"), [("gelu", (0, 1)), ("blocks", (1, 1))])
def test_computing_activations_again_leaves_gradients_equal(golden_model, images, noise, monkeypatch, what, again):
    gradients, calls, gelu = [], [], torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: calls.append("gelu") or gelu(x))
    for chosen in ("none", what):
        model = golden_model().train()
        model.checkpoint_activations(chosen)
        model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
        calls.clear()
        model(images, noise=noise).loss.backward()
        extra = again if chosen == what else (0, 0)
        assert calls.count("mlp") == 1 + extra[0]  # computed again in the backward pass
        assert calls.count("gelu") == 3 * (1 + extra[1])  # of 2 + 1 blocks
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_computing_the_gelu_again_keeps_a_quarter_less(tiny, images, noise):
    kept = {}
    for what in ("none", "gelu"):
        model, sizes = MAEForPreTraining(tiny()), {}
        model.checkpoint_activations(what)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(tensor, sizes=sizes, storages=storages):
            if (storage := tensor.untyped_storage()).data_ptr() not in storages:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.train()(images, noise=noise).loss
        kept[what] = sum(sizes.values())
        loss.backward()
    assert kept["gelu"] < 0.85 * kept["none"]  # of blocks and, in this tiny model, much that is none


def test_bfloat16_keeps_target_and_loss_in_float32(golden_model, images, noise):
    model = golden_model(norm_pix_loss=True)
    expected = model(images, noise=noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(images, noise=noise)
    cast = model.to(torch.bfloat16)(images, noise=noise)
    assert (autocast.loss.dtype, cast.loss.dtype) == (torch.float32, torch.float32)
    assert cast.pred.dtype is torch.bfloat16
    for out in (autocast, cast):
        assert_close(out.loss, expected, atol=1e-2, rtol=0)  # three significant digits of bfloat16


def test_blocks_are_the_unit_of_sharding(tiny):
    assert list(MAEForPreTraining(tiny())._no_split_modules) == ["Block"]


# Refusals


def test_inputs_that_do_not_fit_are_refused(tiny, images, noise):
    model = MAEForPreTraining(tiny())
    for call, message in (
        (lambda: model(images[:, :1]), r"\(2, 1, 32, 32\) do not fit num_channels=3; pass \[N, 3, H, W\]"),
        (lambda: model(images[..., :30]), r"32 x 30 pixels are not a multiple of patch_size=8"),
        (lambda: model(images, noise=noise[:, :9]), r"noise of shape \(2, 9\) does not fit; pass \[2, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_mask_ratio_zero_encodes_but_has_no_loss(tiny, images, noise):
    assert MAEModel(tiny(mask_ratio=0.0))(images, noise=noise).last_hidden_state.shape == (2, 17, 48)
    with pytest.raises(ValueError, match=r"mask_ratio=0.0 removes none of 16 patches, so there is no loss"):
        MAEForPreTraining(tiny(mask_ratio=0.0))(images)


def test_fields_set_after_construction_are_checked_by_the_model(tiny):
    config = tiny()
    config.image_size = 30
    with pytest.raises(ValueError, match=r"image_size=30 is not a multiple of patch_size=8"):
        AutoModel.from_config(config)
