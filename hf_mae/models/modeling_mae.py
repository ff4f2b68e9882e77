"""Masked autoencoder: a ViT encoder that sees the visible patches, and a small decoder that predicts the others.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners". Module names are those of the official code
and of timm, so the official weights load as they are. All classes share the same flat names: the encoder inside
`MAEForPreTraining` is not wrapped, and `MAEModel` reads the same folder without the decoder.

A training step computes what the loss needs, with the numbers of the official code up to float order: visible patches
are picked before they are embedded; the decoder sees its tokens in the order [cls, kept, removed]; its last block, its
head, the target and the loss are computed for removed patches only. Measured in benchmarks/README.md.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.convert import (
    check_files,
    check_finite,
    config_from_state_dict,
    list_names,
    load_folder,
    load_official_checkpoint,
)
from hf_mae.models.layers import Block, Mlp, PatchEmbed
from hf_mae.models.masking import Masking, count_kept, mask_from_noise, mask_noise, num_uniforms
from hf_mae.models.pos_embed import Interpolation, positions_for, sincos_pos_embed
from hf_mae.models.targets import make_target, patchify, unpatchify
from hf_mae.resolve import fetch, locate, read_config

if TYPE_CHECKING:
    from typing_extensions import Self

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass
class MAEModelOutput(ModelOutput):
    """What the encoder returns; None where it does not apply.

    Args:
        last_hidden_state: [N, 1 + L, D] after the final norm, cls token first; [N, 1 + L_keep, D] when masked.
        mask: [N, L], 1 = removed; None without masking.
        ids_restore: [N, L], undoes the shuffle of the patches; None without masking.
        hidden_states: the embedded tokens and the output of every block, before the final norm.
        attentions: per block [N, heads, tokens, tokens].
    """

    last_hidden_state: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MAEForPreTrainingOutput(ModelOutput):
    """What a pretraining step returns.

    Args:
        loss: mean squared error over the removed patches of the batch, float32; 0 of an empty batch.
        pred: [N, L, p * p * C], a prediction for every patch, the visible ones included; None in training unless asked.
        mask: [N, L], 1 = removed.
        ids_restore: [N, L], undoes the shuffle of the patches.
        latent: [N, 1 + L_keep, D], the encoder's output; all patches in reading order with mask tokens in the encoder.
        hidden_states: of the encoder, as in `MAEModelOutput`.
        attentions: of the encoder, as in `MAEModelOutput`.
    """

    loss: Tensor | None = None
    pred: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    latent: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MAEPreTrainedModel(PreTrainedModel):
    """The encoder, and what every class built on it shares: initialisation, positions and loading."""

    config_class = MAEConfig
    config: MAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    base_model_prefix = "mae"  # no module has this name: all classes share flat names
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    pos_embed: Tensor

    def __init__(self, config: MAEConfig):
        config.validate_fields()
        super().__init__(config)
        self.build()
        self.post_init()

    def build(self) -> None:
        """Create the modules. Subclasses extend it, so that weights are initialised once, when all modules exist."""
        config = self.config
        D = config.hidden_size
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self._add_positions("pos_embed", D)
        if config.mask_tokens_in_encoder:
            self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList(
            Block(config, D, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def checkpoint_activations(self, what: Literal["none", "gelu", "blocks"]) -> None:
        """Choose what the backward pass computes again rather than finds kept; the numbers stay the same.

        Args:
            what: nothing; the GELU of every block, a quarter of all that is kept; or whole blocks.

        Raises:
            ValueError: it is none of these.
        """
        if what not in ("none", "gelu", "blocks"):
            raise ValueError(f"checkpoint_activations={what!r} is unknown; use 'none', 'gelu' or 'blocks'.")
        # Renamed after transformers 5.20; the old names warn.
        old, new = self.gradient_checkpointing_disable, self.gradient_checkpointing_enable
        off, on = (
            getattr(self, f"activation_checkpointing_{state}", method)
            for state, method in (("disable", old), ("enable", new))
        )
        (on if what == "blocks" else off)()
        for module in self.modules():
            if isinstance(module, Mlp):
                module.recompute_gelu = what == "gelu"

    def _add_positions(self, name: str, width: int) -> None:
        # A fixed table is a persistent buffer: it is saved under the official name, and no loader makes it trainable.
        table = torch.zeros(1, 1 + self.config.num_patches, width)
        if self.config.pos_embed == "sincos":
            self.register_buffer(name, table)
        elif self.config.pos_embed == "learned":
            self.register_parameter(name, nn.Parameter(table))
        else:
            raise ValueError(f"pos_embed={self.config.pos_embed!r} is unknown; use 'sincos' or 'learned'.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the direct weights of one module as the paper's code does.

        transformers calls this for every module, the model itself last, also for what a checkpoint lacked. Only its
        `init` functions may be used, on whole tensors: they leave alone what was loaded, which views would hide.
        """
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # The weight is xavier-uniform as that of the linear layer it stands for; the bias is left at PyTorch's.
            fan_out, fan_in = module.weight.shape[0], module.weight[0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(cast(Tensor, module.bias), -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, MAEPreTrainedModel):
            for parameter in module.parameters(recurse=False):  # tokens, and positions when they are learned
                init.normal_(parameter, std=0.02)
            for name, table in module.named_buffers(recurse=False):
                if name in ("pos_embed", "decoder_pos_embed"):
                    init.copy_(table, sincos_pos_embed(table.shape[-1], module.config.grid)[None])

    def patchify(self, pixel_values: Tensor) -> Tensor:
        """Cut [N, C, H, W] into patches [N, L, h * w * C].

        Raises:
            ValueError: the channels are not the model's, or the size is not a multiple of the patch size.
        """
        patch_size = height_width(self.config.patch_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} do not fit num_channels={self.config.num_channels};"
                f" pass [N, {self.config.num_channels}, H, W]."
            )
        if pixel_values.shape[2] % patch_size[0] or pixel_values.shape[3] % patch_size[1]:
            raise ValueError(
                f"pixel_values of {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels are not a multiple of "
                f"patch_size={self.config.patch_size}; resize or crop the images."
            )
        return patchify(pixel_values, patch_size)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Put [N, L, h * w * C] back together to [N, C, H, W]; `grid` is the config's unless given."""
        patch_size = height_width(self.config.patch_size)
        return unpatchify(patches, patch_size, grid or self.config.grid, self.config.num_channels)

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches of these images."""
        h, w = height_width(self.config.patch_size)
        return pixel_values.shape[2] // h, pixel_values.shape[3] // w

    def positions(self, table: Tensor, grid: tuple[int, int], interpolate_pos_encoding: Interpolation | None) -> Tensor:
        """Return `pos_embed` or `decoder_pos_embed` for the grid of the input, see `pos_embed.positions_for`."""
        fixed = self.config.pos_embed == "sincos"
        return positions_for(table, self.config.grid, grid, interpolate_pos_encoding, fixed=fixed)

    def masking_of(self, patches: Tensor, noise: Tensor) -> Masking:
        """Return which of the patches [N, L, ...] are kept: those with the smallest noise [N, L].

        Raises:
            ValueError: there is not one value per patch.
        """
        N, L = patches.shape[:2]
        if noise.shape != (N, L):
            raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit; pass [{N}, {L}], one per patch.")
        return mask_from_noise(noise, count_kept(L, self.config.mask_ratio))

    def encode(
        self,
        patches: Tensor,
        pos_embed: Tensor,
        masking: Masking | None = None,
        *,
        branch_scales: Sequence[Tensor | None] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MAEModelOutput:
        """Run the encoder on patches.

        Args:
            patches: [N, L, h * w * C].
            pos_embed: [1, 1 + L, D].
            masking: which patches are kept, see `masking_of`. None keeps all.
            branch_scales: for each block, what its branches are multiplied by, see `layers.drop_path`. None leaves all
                alone.
            output_hidden_states: return the tokens between blocks.
            output_attentions: return the attention weights; needs `attn_implementation="eager"`.

        Raises:
            ValueError: attention weights are asked of an implementation without them.
        """
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attention weights, which attn_implementation="
                f"{self.config._attn_implementation!r} does not compute; call set_attn_implementation('eager') first."
            )
        N = len(patches)
        if masking is None:
            tokens = self.patch_embed(patches) + pos_embed[:, 1:]
        elif self.config.mask_tokens_in_encoder:
            tokens = self.patch_embed(patches)
            mask_token = self.encoder_mask_token.to(tokens.dtype)
            tokens = torch.where(masking.mask[..., None].bool(), mask_token, tokens) + pos_embed[:, 1:]
        else:
            ids_keep = masking.ids_keep
            tokens = self.patch_embed(_gather(patches, ids_keep)) + F.embedding(ids_keep, pos_embed[0, 1:])
        cls_token = (self.cls_token + pos_embed[:, :1]).expand(N, -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1)  # [N, 1 + L_keep, D]
        hidden_states = (tokens,) if output_hidden_states else None
        attentions = () if output_attentions else None
        for i, block in enumerate(self.blocks):
            tokens, weights = block(tokens, 0, None if branch_scales is None else branch_scales[i])
            hidden_states = None if hidden_states is None else (*hidden_states, tokens)
            attentions = None if attentions is None else (*attentions, weights)
        return MAEModelOutput(
            last_hidden_state=self.norm(tokens),
            mask=None if masking is None else masking.mask,
            ids_restore=None if masking is None else masking.ids_restore,
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def forward_features(
        self,
        pixel_values: Tensor,
        pool: Literal["mean", "cls"] | None = None,
        *,
        interpolate_pos_encoding: Interpolation | None = None,
    ) -> Tensor:
        """Return one vector per image, without masking, after the final norm.

        Args:
            pixel_values: [N, C, H, W].
            pool: `mean` of the patch tokens, or the `cls` token; None is `config.pool`.
            interpolate_pos_encoding: what to do at another image size, see `pos_embed.positions_for`.

        Returns:
            [N, D].
        """
        pool = pool or self.config.pool
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool={pool!r} is unknown; use 'mean' or 'cls'.")
        pos_embed = self.positions(self.pos_embed, self.grid_of(pixel_values), interpolate_pos_encoding)
        tokens = cast(Tensor, self.encode(self.patchify(pixel_values), pos_embed).last_hidden_state)
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model and refuse to leave a weight out.

        Args:
            pretrained_model_name_or_path: what the command line takes for a model: a run folder (its newest whole
                checkpoint), a model folder or Hub id, written by this package or in the layout of facebook/vit-mae-*,
                with safetensors weights under any of their names; or a `.pth` file of the official code.
            model_args: passed on.
            output_loading_info: return the report of `transformers` as well.
            kwargs: as for `PreTrainedModel.from_pretrained`; of an official file also what its weights do not show,
                see `from_official`. With `ignore_mismatched_sizes=True` a head of other classes is new, and
                sine-cosine positions are computed for another image size; nothing else may differ.

        Raises:
            ValueError: weights are missing, unexpected (the decoder may be left unread by an encoder), of another
                shape or not finite; a file is damaged or missing (also an OSError); or the folder describes another
                architecture.
            OSError: there is no such repository on the Hub.
            RuntimeError: the Hub did not answer in several tries.
        """
        name = pretrained_model_name_or_path
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False would read pickled weights; leave it out, or use from_official.")
        if name is None or "state_dict" in kwargs:
            return cls._build(None, name or "", *model_args, info=output_loading_info, **kwargs)
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        subfolder, variant = kwargs.pop("subfolder", ""), kwargs.get("variant")
        found = locate(name, subfolder=subfolder)
        folder = fetch(found, subfolder=subfolder, variant=variant, **hub) if isinstance(found, str) else found
        is_file = folder.is_file()
        if is_file or _is_vit_mae(folder):
            checkpoint = load_official_checkpoint(folder) if is_file else None
            given = kwargs.pop("config", None)
            if not isinstance(given, PreTrainedConfig):
                # "auto" is for the loader, not for the config; num_labels is stored as id2label.
                known = MAEConfig().to_dict().keys() - {"dtype"} | {"num_labels"}
                fields = {key: kwargs.pop(key) for key in list(kwargs) if key in known}
                if checkpoint is not None and given is None:
                    given = config_from_state_dict(checkpoint.state_dict, args=checkpoint.args, **fields)
                else:
                    given = MAEConfig.from_pretrained(given or folder, **fields)
            weights = load_folder(folder, variant=variant) if checkpoint is None else checkpoint.state_dict
            kwargs |= {"config": given, "state_dict": weights}
        else:
            check_files(folder, variant=variant)
        shown = folder if isinstance(found, Path) else found
        place = None if "state_dict" in kwargs else str(folder)
        return cls._build(place, shown, *model_args, info=output_loading_info, **kwargs)

    @classmethod
    def _build(
        cls, folder: str | None, source: str | os.PathLike[str], *model_args: Any, info: bool, **kwargs: Any
    ) -> Any:
        """Load a folder of ours, or the given config and state_dict, and check what came of it."""
        may_be_new = kwargs.pop("ignore_mismatched_sizes", False)
        with _held_report():
            model, found = cast(
                "tuple[Self, dict[str, Any]]",
                super().from_pretrained(
                    folder, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                ),
            )
            said = source or "the state_dict"
            model._check_shapes(found, said, may_be_new=may_be_new)
            model._check_loading(found, said)
            check_finite(model.state_dict().items(), said)
        model.name_or_path = model.config.name_or_path = str(source)
        return (model, found) if info else model

    @classmethod
    def from_official(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Load a `.pth` file of the official code.

        Args:
            path: the file; see `convert.load_official_checkpoint` for what is read of it.
            overrides: fields of `MAEConfig` that the weights do not show, such as `norm_pix_loss`.

        Raises:
            ValueError: the file is refused, a field cannot be inferred, or weights are missing, of another shape or not
                finite.
        """
        checkpoint = load_official_checkpoint(path)
        config = config_from_state_dict(checkpoint.state_dict, args=checkpoint.args, **overrides)
        return cls._build(None, path, info=False, config=config, state_dict=checkpoint.state_dict)

    def _check_shapes(self, info: dict[str, Any], source: str | os.PathLike[str], *, may_be_new: bool) -> None:
        wrong = {name: (saved, own) for name, saved, own in info["mismatched_keys"]}
        if may_be_new:  # transformers says so; a fixed table is computed for its new grid
            fixed = ("pos_embed", "decoder_pos_embed") if self.config.pos_embed == "sincos" else ()
            wrong = {name: wrong[name] for name in wrong if not name.startswith("head.") and name not in fixed}
        if wrong:
            raise ValueError(wrong_shapes(source, wrong))

    def _check_loading(self, info: dict[str, Any], source: str | os.PathLike[str]) -> None:
        # What a class may leave unread is named in its _keys_to_ignore_on_load_unexpected and is gone from `info`.
        missing, unexpected = list(info["missing_keys"]), list(info["unexpected_keys"])
        of_decoder = [name for name in missing if name.startswith("decoder_") or name == "mask_token"]
        if "decoder_pred.weight" in missing and of_decoder == missing and not unexpected:
            raise ValueError(
                f"{source} has no decoder ({len(missing)} weights), so {type(self).__name__} could not reconstruct "
                "anything; load it with MAEModel, or use a checkpoint with decoder (of the official files, *_full.pth "
                "and mae_visualize_*.pth)."
            )
        if missing or unexpected:
            raise ValueError(
                f"the weights of {source} do not fit {type(self).__name__}; missing: {list_names(missing) or 'none'}; "
                f"unexpected: {list_names(unexpected) or 'none'}. Load them with the class and config that wrote them."
            )


class MAEModel(MAEPreTrainedModel):
    """The encoder alone. Reads pretraining folders too, and leaves their decoder unread."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder_", r"^mask_token$"]  # noqa: RUF012

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        *,
        interpolate_pos_encoding: Interpolation | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MAEModelOutput:
        """Encode images, without masking unless `noise` asks for it.

        Args:
            pixel_values: [N, C, H, W], normalised.
            noise: [N, L]; removes `config.mask_ratio` of the patches, those with the largest noise.
            interpolate_pos_encoding: what to do at another image size, see `pos_embed.positions_for`.
            output_hidden_states: return the tokens between blocks; None is the config's choice.
            output_attentions: return the attention weights; None is the config's choice.

        Returns:
            `MAEModelOutput`, or a tuple with `return_dict=False`.
        """
        config = self.config
        patches = self.patchify(pixel_values)
        return self.encode(
            patches,
            self.positions(self.pos_embed, self.grid_of(pixel_values), interpolate_pos_encoding),
            None if noise is None else self.masking_of(patches, noise),
            output_hidden_states=bool(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=bool(config.output_attentions if output_attentions is None else output_attentions),
        )


class MAEForPreTraining(MAEPreTrainedModel):
    """Encoder, decoder and reconstruction loss."""

    decoder_pos_embed: Tensor

    def build(self) -> None:
        """Create the encoder, then the decoder."""
        super().build()
        config = self.config
        D = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, D)
        if not config.mask_tokens_in_encoder:  # else the decoder receives a token for every patch
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self._add_positions("decoder_pos_embed", D)
        self.decoder_blocks = nn.ModuleList(
            Block(config, D, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(D, config.patch_dim)

    def decode(
        self, latent: Tensor, masking: Masking, decoder_pos_embed: Tensor, *, removed_only: bool = False
    ) -> Tensor:
        """Predict patches, in the order of `masking.ids_shuffle`: attention does not mind, so nothing is put back.

        Args:
            latent: [N, 1 + L_keep, D] from `encode`, or [N, 1 + L, D] with mask tokens in the encoder.
            masking: what `encode` was given.
            decoder_pos_embed: [1, 1 + L, D_decoder].
            removed_only: predict the removed patches only; the last block then computes no other token.

        Returns:
            [N, L, h * w * C], the kept patches first; [N, L - L_keep, h * w * C] with `removed_only`.
        """
        tokens = self.decoder_embed(latent)
        cls_token, patches = tokens.split([1, tokens.shape[1] - 1], dim=1)
        if self.config.mask_tokens_in_encoder:
            patches = _gather(patches, masking.ids_shuffle)
        else:
            mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), masking.ids_remove.shape[1], -1)
            patches = torch.cat([patches, mask_tokens], dim=1)
        patches = patches + F.embedding(masking.ids_shuffle, decoder_pos_embed[0, 1:])
        tokens = torch.cat([cls_token + decoder_pos_embed[:, :1], patches], dim=1)
        *blocks, last = self.decoder_blocks
        for block in blocks:
            tokens, _ = block(tokens)
        tokens, _ = last(tokens, 1 + masking.len_keep if removed_only else 1)
        return self.decoder_pred(self.decoder_norm(tokens))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        *,
        return_pred: bool | None = None,
        interpolate_pos_encoding: Interpolation | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MAEForPreTrainingOutput:
        """Mask images, reconstruct them and compare.

        Args:
            pixel_values: [N, C, H, W], normalised; also the source of the target.
            noise: [N, L], the patches with the largest noise are removed. None draws it for `config.mask_strategy` from
                PyTorch's global generator.
            return_pred: return `pred`. None returns it in evaluation mode only.
            interpolate_pos_encoding: what to do at another image size, see `pos_embed.positions_for`.
            output_hidden_states: return the encoder's tokens between blocks; None is the config's choice.
            output_attentions: return the encoder's attention weights; None is the config's choice.

        Returns:
            `MAEForPreTrainingOutput`, or a tuple with `return_dict=False`.

        Raises:
            ValueError: nothing is removed, so that there is no loss, or the inputs do not fit.
        """
        config = self.config
        patches, grid = self.patchify(pixel_values), self.grid_of(pixel_values)
        N, L, _ = patches.shape
        if count_kept(L, config.mask_ratio) == L:
            raise ValueError(
                f"mask_ratio={config.mask_ratio} removes none of {L} patches, so there is no loss; "
                "raise mask_ratio, or use MAEModel to encode without masking."
            )
        if noise is None:
            uniforms = torch.rand(N, num_uniforms(config.mask_strategy, grid), device=pixel_values.device)
            noise = mask_noise(config.mask_strategy, uniforms, grid, config.mask_ratio)
        masking = self.masking_of(patches, noise)
        encoded = self.encode(
            patches,
            self.positions(self.pos_embed, grid, interpolate_pos_encoding),
            masking,
            output_hidden_states=bool(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=bool(config.output_attentions if output_attentions is None else output_attentions),
        )
        latent = cast(Tensor, encoded.last_hidden_state)
        if return_pred is None:
            return_pred = not self.training
        decoder_pos_embed = self.positions(self.decoder_pos_embed, grid, interpolate_pos_encoding)
        pred = self.decode(latent, masking, decoder_pos_embed, removed_only=not return_pred)
        removed = pred[:, masking.len_keep :] if return_pred else pred
        target = make_target(config, _gather(patches, masking.ids_remove))
        removed = removed.to(target.dtype)
        return MAEForPreTrainingOutput(
            loss=F.mse_loss(removed, target) if N else removed.sum(),  # the mean of nothing would be nan
            pred=_gather(pred, masking.ids_restore) if return_pred else None,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            latent=latent,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


def wrong_shapes(
    source: str | os.PathLike[str], wrong: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> ValueError:
    """Return the error of weights that have other shapes than the model.

    Args:
        source: where the weights are from.
        wrong: names to the shapes of weight and model.
    """
    name = min(wrong)
    saved, own = (" x ".join(map(str, shape)) for shape in wrong[name])
    others = list_names([one for one in wrong if one != name])
    remedy = "load them with the config that they were saved with, or get the folder again"
    if all(one.startswith("head.") for one in wrong):
        remedy = (
            "for other classes build a new head: MAEForImageClassification.from_encoder(..., num_labels=N), or "
            "ignore_mismatched_sizes=True"
        )
    elif all(one.endswith("pos_embed") for one in wrong):
        remedy = (
            "load them at their own image_size and pass interpolate_pos_encoding=True to forward, or build a "
            "classifier of another size with from_encoder(..., image_size=N)"
        )
    return ValueError(
        f"the weights of {source} have other shapes than its config says: {name} is {saved} and has to be {own}"
        f"{f' (also {others})' if others else ''}; {remedy}."
    )


def _is_vit_mae(folder: Path) -> bool:
    if read_config(folder).get("model_type") == "vit_mae":
        return True
    MAEConfig.get_config_dict(folder)  # refuses what is not ours
    return False


@contextmanager
def _held_report() -> Iterator[None]:
    """Keep back what transformers logs of a loading, and log it unless an error says it in one sentence."""
    logger, held = logging.getLogger(PreTrainedModel.__module__), []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


def _gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens [N, L, D] by position [N, K]; ids are unique per row, so the backward pass adds nothing twice."""
    return torch.gather(tokens, 1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


AutoConfig.register(MAEConfig.model_type, MAEConfig)
AutoModel.register(MAEConfig, MAEModel)
AutoModelForPreTraining.register(MAEConfig, MAEForPreTraining)
