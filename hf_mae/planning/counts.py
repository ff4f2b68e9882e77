"""What a model costs: FLOPs, parameters and saved activations, as sums over a list of block sizes.

FLOPs are 2 per multiply-add of every matrix product, the convention of `torch.utils.flop_counter`; norms, GELU, softmax
and the optimizer count nothing. The tests hold all three to the real model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from hf_mae.recipes.base import Model, Size
from hf_mae.recipes.fields import choose, unknown

Precision: TypeAlias = Literal["no", "tf32", "bf16", "fp16"]
Attention: TypeAlias = Literal["sdpa", "eager"]
Checkpoint: TypeAlias = Literal["none", "gelu", "blocks"]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A transformer block: `tokens` come in, the last `outputs` of them are computed."""

    tokens: int
    outputs: int
    width: int
    hidden: int
    heads: int

    @property
    def flops(self) -> int:
        """Forward FLOPs per image: qkv of all tokens; scores, values, projection and MLP of the outputs."""
        n, m, D = self.tokens, self.outputs, self.width
        return 2 * (3 * n * D * D + 2 * m * n * D + m * D * D + 2 * m * D * self.hidden)

    @property
    def parameters(self) -> int:
        """Weights and biases: two norms, qkv, projection, two layers of the MLP."""
        D, F = self.width, self.hidden
        return 4 * D + 3 * D * (D + 1) + D * (D + 1) + F * (D + 1) + D * (F + 1)

    def activations(self, precision: Precision, attention: Attention, checkpoint: Checkpoint = "none") -> int:
        """Bytes per image that the forward pass keeps for the backward pass.

        With blocks checkpointed that is their float32 input alone.

        The residual stream and the statistics of norms are float32 also under autocast; inputs of matrix products have
        its type. sdpa keeps one logarithm per head and query; eager keeps the weights, under autocast on a GPU once in
        float32 (softmax) and once more in half.
        """
        n, m, D, item = self.tokens, self.outputs, self.width, item_size(precision)
        if checkpoint not in (known := get_args(Checkpoint)):
            raise unknown("engine.checkpoint_activations", checkpoint, known)
        if attention not in (known := get_args(Attention)):
            raise unknown("attention", attention, known)
        if checkpoint == "blocks":
            return 4 * n * D
        residual = (4 * D + 8) * (n + m)
        qkv, weights = 3 * n * D, 4
        if attention == "eager":  # copies its operands, so unread queries are dropped
            qkv, weights = (m + 2 * n) * D, n * (4 if item == 4 else 4 + item)
        hidden = (1 if checkpoint == "gelu" else 2) * m * self.hidden
        products = item * (n * D + qkv + 2 * m * D + hidden)
        return residual + products + self.heads * m * weights


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A masked autoencoder as sizes, per image."""

    patches: int
    kept: int
    embedded: int
    """Patches that are embedded."""
    predicted: int
    """Tokens that reach the head; the loss reads `removed` of them."""
    patch_dim: int
    encoder: tuple[BlockShape, ...]
    decoder: tuple[BlockShape, ...]

    @property
    def removed(self) -> int:
        """Patches in the loss."""
        return self.patches - self.kept


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs per image. The backward pass takes twice as many; pixels need no gradient."""

    embed: int
    encoder: int
    decoder: int
    head: int

    @property
    def forward(self) -> int:
        """All of the forward pass."""
        return self.embed + self.encoder + self.decoder + self.head

    @property
    def backward(self) -> int:
        """All of the backward pass, nothing recomputed."""
        return 2 * self.forward - self.embed

    @property
    def step(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def decoder_share(self) -> float:
        """Fraction of the forward pass in decoder and head."""
        return (self.decoder + self.head) / self.forward


def item_size(precision: Precision) -> int:
    """Return the bytes of one number that enters a matrix product."""
    return choose("engine.precision", precision, {"no": 4, "tf32": 4, "bf16": 2, "fp16": 2})


def shapes(model: Model, *, shortcuts: bool = True) -> Shapes:
    """Return the sizes of a model.

    Args:
        model: the architecture.
        shortcuts: as this package trains: only kept patches are embedded; the last decoder block and the head compute
            removed patches only. False is the plain order of the official code, with the same result.

    Raises:
        ValueError: the sizes contradict each other.
    """
    (H, W), (h, w) = _sides(model.image_size), _sides(model.patch_size)
    if H % h or W % w or not H * W:
        raise ValueError(
            f"model.image_size={model.image_size} is not a multiple of model.patch_size={model.patch_size}; change one"
        )
    L = (H // h) * (W // w)
    kept = int(L * (1 - model.mask_ratio))  # truncated as in `models.masking.count_kept`
    if kept == 0:
        raise ValueError(f"model.mask_ratio={model.mask_ratio} keeps none of {L} patches; lower it")
    for prefix in ("", "decoder_"):
        width, heads = getattr(model, f"{prefix}hidden_size"), getattr(model, f"{prefix}num_attention_heads")
        if width % heads:
            raise ValueError(
                f"model.{prefix}hidden_size={width} is not a multiple of model.{prefix}num_attention_heads={heads}; "
                "change one"
            )
    if model.decoder_num_hidden_layers < 1 or model.num_hidden_layers < 1:
        raise ValueError("model.num_hidden_layers and model.decoder_num_hidden_layers must be at least 1")
    whole = model.mask_tokens_in_encoder
    seen = L + 1 if whole else kept + 1
    encoder = BlockShape(
        tokens=seen,
        outputs=seen,
        width=model.hidden_size,
        hidden=model.intermediate_size or 4 * model.hidden_size,
        heads=model.num_attention_heads,
    )
    decoder = BlockShape(
        tokens=L + 1,
        outputs=L + 1,
        width=model.decoder_hidden_size,
        hidden=model.decoder_intermediate_size or 4 * model.decoder_hidden_size,
        heads=model.decoder_num_attention_heads,
    )
    predicted = L - kept if shortcuts else L + 1
    last = replace(decoder, outputs=predicted)
    return Shapes(
        patches=L,
        kept=kept,
        embedded=kept if shortcuts and not whole else L,
        predicted=predicted,
        patch_dim=h * w * model.num_channels,
        encoder=(encoder,) * model.num_hidden_layers,
        decoder=(decoder,) * (model.decoder_num_hidden_layers - 1) + (last,),
    )


def count_flops(model: Model, *, shortcuts: bool = True) -> Flops:
    """Return the FLOPs of one image, see `shapes` for the shortcuts."""
    s = shapes(model, shortcuts=shortcuts)
    D, D_decoder = model.hidden_size, model.decoder_hidden_size
    return Flops(
        embed=2 * s.embedded * s.patch_dim * D,
        encoder=sum(block.flops for block in s.encoder),
        decoder=2 * s.encoder[0].tokens * D * D_decoder + sum(block.flops for block in s.decoder),
        head=2 * s.predicted * D_decoder * s.patch_dim,
    )


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Trained numbers, and the fixed position tables that are saved with them."""

    encoder: int
    decoder: int
    tables: int
    encoder_tables: int

    @property
    def trained(self) -> int:
        """Trained numbers of encoder and decoder."""
        return self.encoder + self.decoder


def count_parameters(model: Model) -> Parameters:
    """Return the parameters of `MAEForPreTraining`."""
    s = shapes(model)
    D, D_decoder, P = model.hidden_size, model.decoder_hidden_size, s.patch_dim
    tables = ((s.patches + 1) * D, (s.patches + 1) * D_decoder)
    kinds = {"learned": (tables, (0, 0)), "sincos": ((0, 0), tables)}
    learned, fixed = choose("model.pos_embed", model.pos_embed, kinds)
    whole = model.mask_tokens_in_encoder
    return Parameters(
        # Patch embedding, cls token, mask token, positions, blocks, norm.
        encoder=D * (P + 1) + D + D * whole + learned[0] + sum(b.parameters for b in s.encoder) + 2 * D,
        # Embedding, mask token, positions, blocks, norm, head.
        decoder=D_decoder * (D + 1)
        + D_decoder * (not whole)
        + learned[1]
        + sum(b.parameters for b in s.decoder)
        + 2 * D_decoder
        + P * (D_decoder + 1),
        tables=sum(fixed),
        encoder_tables=fixed[0],
    )


def activation_bytes(
    model: Model,
    precision: Precision,
    attention: Attention = "sdpa",
    *,
    checkpoint: Checkpoint = "none",
    shortcuts: bool = True,
) -> int:
    """Return the bytes per image that wait for the backward pass, without the copies of weights that autocast makes.

    Args:
        model: the architecture.
        precision: autocast type; tf32 is stored as float32.
        attention: the kernel.
        checkpoint: what is recomputed rather than kept, see `hf_mae.recipes.base.Engine`.
        shortcuts: as in `shapes`.
    """
    s = shapes(model, shortcuts=shortcuts)
    item = item_size(precision)
    blocks = sum(block.activations(precision, attention, checkpoint) for block in (*s.encoder, *s.decoder))
    ends = [(s.encoder[0].tokens, model.hidden_size), (s.predicted, model.decoder_hidden_size)]
    norms = sum(tokens * (4 * width + 8 + item * width) for tokens, width in ends)  # norm, then a linear layer
    pixels = s.embedded * s.patch_dim * item
    order = 8 * s.patches * (model.mask_tokens_in_encoder or model.pos_embed == "learned")
    if model.mask_tokens_in_encoder:  # which tokens are masked, and the decoder's tokens before they are shuffled
        order += s.patches + s.encoder[0].tokens * model.decoder_hidden_size * item
    return (
        blocks + norms + pixels + order + 2 * 4 * (s.removed if shortcuts else s.patches) * s.patch_dim
    )  # pred, target


def working_bytes(
    model: Model,
    precision: Precision,
    attention: Attention = "sdpa",
    *,
    checkpoint: Checkpoint = "none",
    shortcuts: bool = True,
) -> int:
    """Return bytes per image beside the saved ones, as an upper estimate: pixels, and the gradients inside a block.

    Pixels are there as uint8, normalised float32 and patches. The largest block is counted once for the gradients in
    flight, and once more when its activations are recomputed.
    """
    s = shapes(model, shortcuts=shortcuts)
    block = max(b.activations(precision, attention) for b in (*s.encoder, *s.decoder))
    return 9 * s.patches * s.patch_dim + block * (2 if checkpoint == "blocks" else 1)


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
