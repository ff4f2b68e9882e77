"""The encoder with a classification head: for fine-tuning, whole or in part, linear probes and training from scratch.

Source: He et al. 2022, appendix A.1 and Fig. 9. Module names are the official ones. A head reads one of two features:
the mean of the patch tokens, then `fc_norm` (and there is no `norm`); or `norm`, then the cls token (and no `fc_norm`).
The only randomness of a training step, drop path, can be passed in as `drop_path_noise`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.convert import (
    check_finite,
    config_from_state_dict,
    list_names,
    load_folder,
    load_official_checkpoint,
)
from hf_mae.models.layers import Block, drop_path
from hf_mae.models.modeling_mae import MAEModelOutput, MAEPreTrainedModel, wrong_shapes
from hf_mae.models.pos_embed import Interpolation, resize_pos_embed
from hf_mae.recipes.base import Size
from hf_mae.resolve import fetch, locate

if TYPE_CHECKING:
    from typing_extensions import Self


class MAEForImageClassification(MAEPreTrainedModel):
    """Encoder and classification head.

    Attributes:
        drop_path_rates: share of the samples that skip each residual branch in training: attention and MLP of the first
            block, of the second, and so on. From 0 to `config.drop_path_rate` on a line; 0 in frozen blocks.
    """

    # What a pretraining checkpoint has and a classifier has no use for; `norm` is left where the pool is the mean.
    _keys_to_ignore_on_load_unexpected = [r"^decoder_", r"^mask_token$", r"^encoder_mask_token$", r"^norm\."]  # noqa: RUF012

    drop_path_bits: Tensor

    def build(self) -> None:
        """Create the encoder, then `fc_norm` or not, then the head."""
        super().build()
        config = self.config
        D = config.hidden_size
        if config.mask_tokens_in_encoder:
            del self.encoder_mask_token  # nothing is masked here, and DDP stops at parameters without gradients
        if config.pool not in ("mean", "cls"):
            raise ValueError(f"pool={config.pool!r} is unknown; use 'mean' or 'cls'.")
        if config.head not in ("linear", "batchnorm"):
            raise ValueError(f"head={config.head!r} is unknown; use 'linear' or 'batchnorm'.")
        is_mean = config.pool == "mean"
        if is_mean:
            self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(D, eps=config.layer_norm_eps) if is_mean else nn.Identity()
        linear = nn.Linear(D, _count_labels(config))
        self.head = (
            linear if config.head == "linear" else nn.Sequential(nn.BatchNorm1d(D, eps=1e-6, affine=False), linear)
        )
        # The rates beside the images, so that no forward pass copies them to a GPU and waits. As integers, their bits:
        # a model that is cast to another type keeps them.
        bits = torch.zeros(2 * config.num_hidden_layers, dtype=torch.int32)
        self.register_buffer("drop_path_bits", bits, persistent=False)
        self.drop_path_rates = _rates(config)

    @property
    def drop_path_rates(self) -> list[float]:
        """Two for each block."""
        return self._drop_path_rates

    @drop_path_rates.setter
    def drop_path_rates(self, rates: list[float]) -> None:
        self._drop_path_rates = rates
        self._fill_drop_path_bits()

    @torch.no_grad()
    def _fill_drop_path_bits(self) -> None:
        rates = torch.tensor(self.drop_path_rates, dtype=torch.float32, device="cpu")
        self.drop_path_bits.copy_(rates.view(torch.int32))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self._fill_drop_path_bits()  # no file has them, and loading leaves them empty
        if module is self._linear:
            self._init_linear(self._linear)
        elif isinstance(module, nn.BatchNorm1d):
            for name, statistic in module.named_buffers():
                init.constant_(statistic, float(name == "running_var"))
        else:
            super()._init_weights(module)

    def _init_linear(self, linear: nn.Linear) -> None:
        std = self.config.head_init_std
        if std > 0:
            # Differs from the official bound of 2, which bounds nothing at 2e-5: older versions of PyTorch invert a
            # uniform number that can be exactly -1, and so would make a weight of -2 once in 2 ** 24.
            bound = min(2.0, 6 * std)
            init.trunc_normal_(linear.weight, std=std, a=-bound, b=bound)
        else:
            init.zeros_(linear.weight)
        init.zeros_(linear.bias)

    @property
    def _linear(self) -> nn.Linear:
        return cast(nn.Linear, self.head[1] if isinstance(self.head, nn.Sequential) else self.head)

    @property
    def num_drop_path_draws(self) -> int:
        """Uniforms that one sample needs for drop path: two per block."""
        return 2 * self.config.num_hidden_layers

    def _encode_images(
        self,
        pixel_values: Tensor,
        drop_path_noise: Tensor | None,
        interpolate_pos_encoding: Interpolation | None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MAEModelOutput:
        patches, N = self.patchify(pixel_values), len(pixel_values)
        if drop_path_noise is not None and drop_path_noise.shape != (N, self.num_drop_path_draws):
            raise ValueError(
                f"drop_path_noise of shape {tuple(drop_path_noise.shape)} does not fit; pass "
                f"[{N}, {self.num_drop_path_draws}], two uniforms per block."
            )
        scales = None
        if self.training and any(self.drop_path_rates):
            if drop_path_noise is None:
                drop_path_noise = torch.rand(N, self.num_drop_path_draws, device=pixel_values.device)
            scales = drop_path(drop_path_noise, self.drop_path_rates, self.drop_path_bits.view(torch.float32))
        pos_embed = self.positions(self.pos_embed, self.grid_of(pixel_values), interpolate_pos_encoding)
        return self.encode(
            patches,
            pos_embed,
            branch_scales=scales,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def _pool(self, tokens: Tensor | None) -> Tensor:
        # [N, 1 + L, D] after `norm`, which a mean pool has not -> [N, D]
        tokens = cast(Tensor, tokens)
        return tokens[:, 0] if self.config.pool == "cls" else self.fc_norm(tokens[:, 1:].mean(dim=1))

    def forward_features(
        self,
        pixel_values: Tensor,
        pool: Literal["mean", "cls"] | None = None,
        *,
        drop_path_noise: Tensor | None = None,
        interpolate_pos_encoding: Interpolation | None = None,
    ) -> Tensor:
        """Return what the head reads, one vector per image: after `norm` or `fc_norm`.

        Args:
            pixel_values: [N, C, H, W], normalised.
            pool: None or `config.pool`, the only one this model has a norm for.
            drop_path_noise: as in `forward`.
            interpolate_pos_encoding: as in `forward`.

        Returns:
            [N, D].

        Raises:
            ValueError: the pool is another, or the inputs do not fit.
        """
        if pool not in (None, self.config.pool):
            raise ValueError(
                f"pool={pool!r} is not what this classifier was built with, config.pool={self.config.pool!r}; leave it "
                "out, or use MAEModel of the encoder."
            )
        encoded = self._encode_images(pixel_values, drop_path_noise, interpolate_pos_encoding)
        return self._pool(encoded.last_hidden_state)

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the features of `forward_features` [N, D] to logits [N, num_labels]."""
        return self.head(features)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        drop_path_noise: Tensor | None = None,
        interpolate_pos_encoding: Interpolation | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: [N, C, H, W], normalised.
            labels: [N] class ids, or [N, num_labels] shares of each class; makes `loss`, cross entropy in float32, 0 of
                an empty batch.
            drop_path_noise: [N, num_drop_path_draws] uniforms in [0, 1); read in training only. A branch is kept where
                its value is at least its rate. None draws them from PyTorch's global generator if any rate is above 0.
            interpolate_pos_encoding: what to do at another image size, see `pos_embed.positions_for`.
            output_hidden_states: return the tokens between blocks; None is the config's choice.
            output_attentions: return the attention weights; None is the config's choice.

        Returns:
            `loss`, `logits` [N, num_labels], `hidden_states`, `attentions`; a tuple with `return_dict=False`.

        Raises:
            ValueError: the inputs do not fit, or attention weights are asked of an implementation without them.
        """
        config = self.config
        encoded = self._encode_images(
            pixel_values,
            drop_path_noise,
            interpolate_pos_encoding,
            output_hidden_states=bool(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=bool(config.output_attentions if output_attentions is None else output_attentions),
        )
        logits = self.forward_head(self._pool(encoded.last_hidden_state))
        # transformers annotates tensors by their legacy type names.
        outputs: dict[str, Any] = {"hidden_states": encoded.hidden_states, "attentions": encoded.attentions}
        if labels is not None:
            scores = logits.float()
            outputs["loss"] = F.cross_entropy(scores, labels) if len(scores) else scores.sum()  # not the nan of 0 / 0
        return ImageClassifierOutput(logits=cast(Any, logits), **outputs)

    def set_trainable(self, blocks: float | None, *, freeze_pos_embed: bool = False) -> None:
        """Choose what is trained, and switch drop path off in what is not.

        Args:
            blocks: None trains everything. A whole number K trains the last K blocks, the norm before the head and the
                head; all blocks mean everything, as in the paper ("24 is full fine-tuning"). 0.5 trains the second norm
                and the MLP of the last block, the norm before the head and the head. 0 trains the head and the norm
                before it; behind batch normalisation the head alone, the official linear probe.
            freeze_pos_embed: keep learned positions as they are.

        Raises:
            ValueError: `blocks` is none of these, or more than there are.

        Source: He et al. 2022, section 4.3 and Fig. 9.
        """
        depth = self.config.num_hidden_layers
        if blocks is None:
            blocks = depth
        if blocks not in (0, 0.5, *range(1, depth + 1)):
            raise ValueError(
                f"blocks={blocks} cannot be trained in an encoder of {depth} blocks; use None (everything), 0, 0.5 "
                f"(the MLP of the last block) or a whole number up to {depth}."
            )
        self.requires_grad_(blocks == depth)
        last = cast(Block, self.blocks[-1])
        trained = [last.norm2, last.mlp] if blocks == 0.5 else [*self.blocks[depth - int(blocks) :]]
        trained += [self.head]
        if blocks > 0 or self.config.head == "linear":
            trained += [self.norm, self.fc_norm]
        for module in trained:
            module.requires_grad_(True)
        if freeze_pos_embed:
            self.pos_embed.requires_grad_(False)
        frozen = 2 * depth - int(2 * blocks)  # branches
        self.drop_path_rates = [0.0] * frozen + _rates(self.config)[frozen:]

    @torch.no_grad()
    def resize_positions(self, image_size: Size) -> None:
        """Take images of another size from now on: the positions are resized (bicubic), as in the official code.

        Raises:
            ValueError: the size does not fit the patches.
        """
        config = MAEConfig.from_dict(self.config.to_dict() | {"image_size": image_size})
        if config.grid != self.config.grid:
            old = self.pos_embed
            table = resize_pos_embed(old.float(), self.config.grid, config.grid).to(old.dtype)
            self.pos_embed = nn.Parameter(table, old.requires_grad) if isinstance(old, nn.Parameter) else table
        self.config.image_size = config.image_size

    @torch.no_grad()
    def resize_head(self, id2label: Mapping[int, str]) -> list[str]:
        """Give the head other classes, and keep what it has learned of those whose names stay.

        Rows of classes with a name of before keep their weights, wherever they now stand; the others are initialised as
        in a fresh head. Where several classes share a name, the first is the first of before, and so on.

        Args:
            id2label: names of the classes 0 to n - 1.

        Returns:
            The names that were kept, in their new order.

        Raises:
            ValueError: the ids are not 0 to n - 1.
        """
        labels = _check_id2label(id2label)
        old, linear = _occurrences(cast("dict[int, str]", self.config.id2label)), self._linear
        # The fresh head is built where the old one lies, and is trained if that was.
        new = nn.Linear(linear.in_features, len(labels), device=linear.weight.device, dtype=linear.weight.dtype)
        self._init_linear(new)
        pairs = [(row, old[key]) for key, row in _occurrences(labels).items() if key in old]
        for row, before in pairs:
            new.weight[row] = linear.weight[before]
            new.bias[row] = linear.bias[before]
        new.requires_grad_(linear.weight.requires_grad)
        if isinstance(self.head, nn.Sequential):
            self.head[1] = new
        else:
            self.head = new
        self.config.id2label = labels
        self.config.label2id = {name: row for row, name in labels.items()}
        return [labels[row] for row, _ in pairs]

    @classmethod
    def from_encoder(
        cls,
        name: str | os.PathLike[str],
        *,
        id2label: Mapping[int, str] | None = None,
        num_labels: int | None = None,
        image_size: Size | None = None,
        pool: Literal["mean", "cls"] = "mean",
        head: Literal["linear", "batchnorm"] = "linear",
        head_init_std: float = 2e-5,
        drop_path_rate: float = 0.0,
        train_pos_embed: bool = True,
        **architecture: Any,
    ) -> Self:
        """Build a classifier on a pretrained encoder, in float32.

        The decoder is left, and `norm` where the pool is the mean. The head and `fc_norm` are new. If the source is a
        classifier of the same pool, `fc_norm` stays; if its head is of the same kind as well, so do the rows of the
        classes whose names stay, see `resize_head`.

        Args:
            name: as for `from_pretrained`: a run folder, a model folder or Hub id of this package's classes or in the
                layout of facebook/vit-mae-*, or a `.pth` file of the official code.
            id2label: names of the classes 0 to n - 1.
            num_labels: how many classes there are, where they have no names (they are then LABEL_0, ..., and no row of
                a head is kept); with `id2label` it has to agree.
            image_size: input size in pixels; None is the encoder's. Another resizes the positions (bicubic).
            pool: what the head reads, see the module.
            head: see `MAEConfig`.
            head_init_std: see `MAEConfig`.
            drop_path_rate: of the last block, see `MAEConfig`.
            train_pos_embed: make the positions a parameter, as the official code does, whatever they were in
                pretraining. False leaves them fixed.
            architecture: fields of `MAEConfig` that the encoder must have; None is ignored. Of an official file, which
                does not show them, `num_attention_heads` and `layer_norm_eps` are taken from here.

        Raises:
            ValueError: a field differs from the encoder's, weights are missing or left over, or the source is refused.
        """
        labels = _labels(id2label, num_labels)
        wanted = {field: value for field, value in architecture.items() if value is not None}
        source, weights, name = _read(name, wanted)
        _check_architecture(name, source, wanted)
        same_pool = "fc_norm.weight" in weights if pool == "mean" else "norm.weight" in weights
        has_head = "head.weight" in weights or "head.1.weight" in weights
        keeps_head = same_pool and source.head == head and has_head and id2label is not None
        changes = {
            "pool": pool,
            "head": head,
            "head_init_std": head_init_std,
            "drop_path_rate": drop_path_rate,
            "pos_embed": "learned" if train_pos_embed else source.pos_embed,
            # A classifier masks nothing, and its grid need not suit the strategy of pretraining.
            "mask_strategy": "random",
            "mask_tokens_in_encoder": False,
            "dtype": None,
            "architectures": None,
        }
        if not keeps_head:
            weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
            changes |= {"id2label": labels, "label2id": {label: row for row, label in labels.items()}}
        model = cls(MAEConfig.from_dict(source.to_dict() | changes))
        model._load_encoder(name, weights)
        if image_size is not None:
            model.resize_positions(image_size)
        if keeps_head:
            model.resize_head(labels)
        model.pos_embed.requires_grad_(train_pos_embed)
        model.name_or_path = model.config.name_or_path = str(name)
        return model

    def _load_encoder(self, name: str | os.PathLike[str], weights: dict[str, Tensor]) -> None:
        left = ("decoder_", "mask_token", "encoder_mask_token", "norm." if self.config.pool == "mean" else "fc_norm.")
        weights = {key: value for key, value in weights.items() if not key.startswith(left)}
        own = self.state_dict()
        for fresh in self._fresh():
            if not fresh & weights.keys():
                weights |= {key: own[key] for key in fresh}
        super()._check_loading(
            {"missing_keys": own.keys() - weights.keys(), "unexpected_keys": weights.keys() - own.keys()}, name
        )
        if wrong := {key: (weights[key].shape, own[key].shape) for key in own if weights[key].shape != own[key].shape}:
            raise wrong_shapes(name, wrong)
        check_finite(weights.items(), name)
        self.load_state_dict(weights)

    def _fresh(self) -> list[set[str]]:
        """Return the weights that an encoder has not: those of the head, and of `fc_norm`."""
        names = self.state_dict().keys()
        return [{name for name in names if name.startswith(prefix)} for prefix in ("head.", "fc_norm.")]

    def _check_loading(self, info: dict[str, Any], source: str | os.PathLike[str]) -> None:
        # A checkpoint without any of these is an encoder's, and transformers has said that they are new. One that has
        # some is a classifier's, which must be whole.
        fresh = set().union(*self._fresh())
        if fresh <= set(info["missing_keys"]):
            info = info | {"missing_keys": set(info["missing_keys"]) - fresh}
        super()._check_loading(info, source)


def _rates(config: MAEConfig) -> list[float]:
    # In float32 as timm's; on the CPU also while a model is being built on the meta device.
    count = config.num_hidden_layers
    rates = torch.linspace(0, config.drop_path_rate, count, dtype=torch.float32, device="cpu").tolist()
    return [rate for rate in rates for _ in range(2)]


def _count_labels(config: MAEConfig) -> int:
    return len(cast("dict[int, str]", config.id2label))


def _check_id2label(id2label: Mapping[int, str]) -> dict[int, str]:
    if not id2label or sorted(id2label) != list(range(len(id2label))):
        raise ValueError(
            f"id2label has the ids {list_names([str(row) for row in id2label]) or 'none'}; name the classes 0 to n - 1."
        )
    return {row: id2label[row] for row in range(len(id2label))}


def _labels(id2label: Mapping[int, str] | None, num_labels: int | None) -> dict[int, str]:
    if id2label is None:
        if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1:
            raise ValueError(
                f"id2label is not given and num_labels={num_labels!r}; name the classes 0 to n - 1 with id2label=, or "
                "say how many there are with num_labels=N."
            )
        return {row: f"LABEL_{row}" for row in range(num_labels)}
    labels = _check_id2label(id2label)
    if num_labels not in (None, len(labels)):
        raise ValueError(
            f"num_labels={num_labels} contradicts id2label, which names {len(labels)}; leave num_labels out."
        )
    return labels


def _occurrences(labels: Mapping[int, str]) -> dict[tuple[str, int], int]:
    # ImageNet has two cranes: a name and how often it stood before -> the class.
    seen: dict[str, int] = {}
    rows = {}
    for row, name in sorted(labels.items()):
        seen[name] = seen.get(name, -1) + 1
        rows[name, seen[name]] = row
    return rows


def _read(
    name: str | os.PathLike[str], wanted: Mapping[str, Any]
) -> tuple[MAEConfig, dict[str, Tensor], str | os.PathLike[str]]:
    """Return config and weights of an encoder, and where it was found."""
    found = locate(name)
    folder = fetch(found) if isinstance(found, str) else found
    if not folder.is_file():
        return MAEConfig.from_pretrained(folder), load_folder(folder), found
    weights = load_official_checkpoint(folder).state_dict
    weights = {key: value for key, value in weights.items() if not key.startswith("decoder_")}
    unseen = {field: wanted[field] for field in ("num_attention_heads", "layer_norm_eps") if field in wanted}
    return config_from_state_dict(weights, **unseen), weights, found


def _check_architecture(name: str | os.PathLike[str], source: MAEConfig, wanted: Mapping[str, Any]) -> None:
    known = source.to_dict()
    for field, value in wanted.items():
        if field not in known:
            raise ValueError(f"{field}={value!r} is no field of MAEConfig; leave it out.")
        has = known[field]
        same = height_width(value) == height_width(has) if field == "patch_size" else value == has
        if not same:
            raise ValueError(
                f"{field}={value!r} is not that of {name}, {has!r}; leave it out, or name another encoder."
            )


AutoModelForImageClassification.register(MAEConfig, MAEForImageClassification)
