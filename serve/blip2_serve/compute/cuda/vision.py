"""The image encoder's forward in few kernels: the same arithmetic, regrouped for GPUs.

- Each sum into the residual stream is one kernel with the norm behind it.
- GELU is part of the product before it.
- The convolution over patches, which do not overlap, is one product, and so are all keys and values
  that the Q-Former's cross-attentions take from an image.
- What does not depend on the image, the Q-Former up to its first look at it, is computed once.

"Rows" are [images * tokens, width]. The ViT's products may be quantized, so they come from
`Products`, which decides how rows pass from a norm or an activation to the next product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, scaled_dot_product_attention

from blip2_serve.compute.cuda.add_norm import add_norm
from blip2_serve.model.qformer import Output, QFormer, QFormerLayer
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.model.vit import VitLayer

# cuBLAS takes 27 µs to multiply 677 rows, one image of 364 pixels, by fc2, and 21 µs for 768 rows.
SLOW_ROWS, FAST_ROWS = range(641, 768), 768
ALIGNMENT = 16  # bytes: products are slow where rows do not start at multiples of it


def supported(encoder: ImageEncoder) -> bool:
    """Whether `FusedEncoder` computes what the encoder's own `forward` does."""
    activations = {encoder.vision_model.config.hidden_act, encoder.qformer.config.hidden_act}
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    return activations == {"gelu"} and all(norm.bias is not None for norm in norms)


class Products:
    """Linear layers on rows in the model's dtype, and what comes before and after them."""

    def weights(self, layer: nn.Linear) -> Any:
        """The layer as the products want it."""
        return layer

    def add_norm(self, x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Any]:
        """(x + more, its layer norm as rows for a product)."""
        return add_norm(x, more, norm)

    def product(self, rows: Any, layer: Any) -> Tensor:
        """`rows` may come from this class or be a tensor in the model's dtype; returns the latter.

        `layer` comes from `weights`.
        """
        return linear(rows, layer.weight, layer.bias)

    def mlp(self, rows: Any, fc1: Any, fc2: Any) -> Tensor:
        """Two products with GELU between them."""
        count = len(rows)
        room = FAST_ROWS if count in SLOW_ROWS else count
        inner = linear_gelu(rows, fc1.weight, fc1.bias, room)
        return linear(inner, fc2.weight, fc2.bias)[:count]


class FusedEncoder:
    """Computes what an `ImageEncoder` that is `supported` does.

    Weights are shared with it, except those that are joined or quantized.
    """

    def __init__(self, encoder: ImageEncoder, products: Products) -> None:
        vision = encoder.vision_model
        self._embedding = _Embedding(encoder)
        self._layers = [_VisionLayer(layer, products) for layer in vision.encoder]
        self._norm = vision.post_layernorm
        self._qformer = _QFormer(encoder.qformer, encoder.query_tokens)
        self._projection = encoder.language_projection
        self._dtype = encoder.dtype

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, H, W] -> image features [B, queries, hidden], both on the device."""
        x, more = self._embedding(pixels)
        for layer in self._layers:
            x, more = layer(x, more, len(pixels))
        _, patches = add_norm(x, more, self._norm)
        seen = self._qformer(patches, len(pixels)).to(self._dtype)
        features: Tensor = self._projection(seen).unflatten(0, (len(pixels), -1))
        return features


class _Embedding:
    """Pixels to patches, and their positions."""

    def __init__(self, encoder: ImageEncoder) -> None:
        embeddings = encoder.vision_model.embeddings
        convolution = embeddings.patch_embedding
        assert convolution.stride == convolution.kernel_size
        weight = convolution.weight.flatten(1)
        self._size, self._columns = convolution.kernel_size[0], weight.shape[1]
        step = ALIGNMENT // weight.element_size()
        self._weight = pad(weight, (0, -self._columns % step))
        # What is added to each token, that of the class first: its patch's product is zero.
        positions = embeddings.position_embedding[0].float()
        assert convolution.bias is not None
        others = positions[1:] + convolution.bias
        added = torch.cat([positions[:1] + embeddings.class_embedding[0], others])
        self._added = added.to(weight.dtype)
        self._scale = encoder.rescale / encoder.std
        self._shift = -encoder.mean / encoder.std

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> products with the patches, and what is to be added to them; both rows."""
        normalised = torch.addcmul(self._shift, pixels.float(), self._scale)
        grid = normalised.unfold(2, self._size, self._size).unfold(3, self._size, self._size)
        count, channels, height, width = grid.shape[:4]
        patches = self._weight.new_zeros(count, 1 + height * width, self._weight.shape[1])
        filled = patches[:, 1:, : self._columns].unflatten(1, (height, width))
        filled.unflatten(3, (channels, self._size, -1)).copy_(grid.permute(0, 2, 3, 1, 4, 5))
        added = self._added[: patches.shape[1]].repeat(count, 1)
        return linear(patches.flatten(0, 1), self._weight), added


class _VisionLayer:
    def __init__(self, layer: VitLayer, products: Products) -> None:
        attention = layer.self_attn
        self._heads = attention.num_heads
        self._products = products
        self._norm1, self._norm2 = layer.layer_norm1, layer.layer_norm2
        self._qkv = products.weights(attention.qkv)
        self._projection = products.weights(attention.projection)
        self._fc1 = products.weights(layer.mlp.fc1)
        self._fc2 = products.weights(layer.mlp.fc2)

    def __call__(self, x: Tensor, more: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Maps a residual stream x + more to the next one, returned in two parts as well.

        Both are the rows of `count` images.
        """
        products = self._products
        x, rows = products.add_norm(x, more, self._norm1)
        qkv = products.product(rows, self._qkv).unflatten(0, (count, -1))
        attended = attend(*_by_head(qkv, 3, self._heads))
        x, rows = products.add_norm(x, products.product(attended, self._projection), self._norm2)
        return x, products.mlp(rows, self._fc1, self._fc2)


class _Weights(NamedTuple):
    weight: Tensor
    bias: Tensor


class _QFormerLayer:
    def __init__(self, layer: QFormerLayer) -> None:
        own = layer.attention.attention
        self.qkv = _joined(own.query, own.key, own.value)
        self.output = layer.attention.output
        look = layer.crossattention
        self.look = look.attention.query if look else None
        self.look_output = look.output if look else None
        self.fc1 = layer.intermediate_query.dense
        self.fc2 = layer.output_query


class _QFormer:
    """The Q-Former with no other input than an image. Computes in the dtype of its weights."""

    def __init__(self, qformer: QFormer, query_tokens: Tensor) -> None:
        layers = [*qformer.encoder]
        self._layers = [_QFormerLayer(layer) for layer in layers]
        self._heads = qformer.config.num_attention_heads
        self._dtype = qformer.layernorm.weight.dtype
        queries = qformer.layernorm(query_tokens.to(self._dtype))
        self._start: Tensor = layers[0].attention(queries, queries)[0]
        looks = [layer.crossattention.attention for layer in layers if layer.crossattention]
        self._looks = len(looks)
        self._patches = _joined(*(part for look in looks for part in (look.key, look.value)))

    def __call__(self, patches: Tensor, count: int) -> Tensor:
        """The patches' rows of `count` images -> the queries' rows."""
        seen = linear(patches.to(self._dtype), *self._patches).unflatten(0, (count, -1))
        keys_and_values = iter(_by_head(seen, 2 * self._looks, self._heads).split(2))
        x = self._start.repeat(count, 1)
        for number, layer in enumerate(self._layers):
            if number > 0:
                qkv = linear(x, *layer.qkv).unflatten(0, (count, -1))
                x = _close(layer.output, attend(*_by_head(qkv, 3, self._heads)), x)
            if layer.look and layer.look_output:
                query = layer.look(x).unflatten(0, (count, -1))
                attended = attend(*_by_head(query, 1, self._heads), *next(keys_and_values))
                x = _close(layer.look_output, attended, x)
            x = _close(layer.fc2, linear_gelu(x, layer.fc1.weight, layer.fc1.bias), x)
        return x


def _close(part: Output, rows: Tensor, x: Tensor) -> Tensor:
    """A product, added to `x`, and the norm of the sum: how each part of a Q-Former layer ends."""
    return add_norm(part.dense(rows), x, part.LayerNorm)[1]


def _joined(*layers: nn.Linear) -> _Weights:
    """Linear layers with the same input as one."""
    weight = torch.cat([layer.weight for layer in layers])
    return _Weights(weight, torch.cat([layer.bias for layer in layers]))


def _by_head(rows: Tensor, parts: int, heads: int) -> Tensor:
    """[B, tokens, parts * heads * head_dim] -> a view, [parts, B, heads, tokens, head_dim]."""
    by_head: Tensor = rows.unflatten(2, (parts, heads, -1))
    return by_head.permute(2, 0, 3, 1, 4)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, tokens, head_dim] each -> rows."""
    attended = scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def linear_gelu(
    rows: Tensor, weight: Tensor, bias: Tensor | None, room: int | None = None
) -> Tensor:
    """GELU of a product. In half precision it has `room` rows, of which the last are arbitrary.

    In half precision, GELU is cuBLAS's, inside the product. It is the approximation with tanh, but
    of the product before that is rounded: no further from the exact value than GELU of rounded
    products is.
    """
    if bias is None or rows.dtype == torch.float32:
        return gelu(linear(rows, weight, bias))
    out = rows.new_empty((room or len(rows), len(weight)))
    torch._addmm_activation(bias, rows, weight.T, use_gelu=True, out=out[: len(rows)])
    return out
