"""The OPT decoder, for a ragged batch: the tokens of all sequences, concatenated.

Linear layers compute one [tokens, hidden] matrix. Only attention depends on which tokens belong
together, and the caller passes it in, so this module knows nothing about sequences, the KV cache or
scheduling. The arithmetic is that of transformers' `OPTForCausalLM`, but with a single projection
for q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from blip2_serve.model.activations import activation
from blip2_serve.model.checkpoint import Checkpoint, allocate
from blip2_serve.model.packing import MakeLinear, replace_linears, replace_with_activation

POSITION_OFFSET = 2  # OPT's position embeddings start with two unused rows

# (layer number, qkv [tokens, 3, heads, head_dim]) -> attended values [tokens, heads, head_dim]
Attend = Callable[[int, Tensor], Tensor]

# (x, more, norm) -> (x + more, norm(x + more)); all [tokens, hidden]
AddNorm = Callable[[Tensor, Tensor, nn.LayerNorm], tuple[Tensor, Tensor]]


def add_norm(x: Tensor, more: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The `AddNorm` in plain torch."""
    x = x + more
    return x, norm(x)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Not initialised: on the meta device, torch would import a compiler for random numbers."""
    embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, width))
    return embedding


class OptLayer(nn.Module):
    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.enable_bias
        affine = config.layer_norm_elementwise_affine
        self.heads = config.num_attention_heads
        self.norm_first = config.do_layer_norm_before
        self.self_attn_layer_norm = nn.LayerNorm(hidden, elementwise_affine=affine)
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.out_proj = nn.Linear(hidden, hidden, bias=bias)
        self.final_layer_norm = nn.LayerNorm(hidden, elementwise_affine=affine)
        self.fc1 = nn.Linear(hidden, config.ffn_dim, bias=bias)
        self.activation = activation(config.activation_function)
        self.fc2 = nn.Linear(config.ffn_dim, hidden, bias=bias)

    def forward(
        self,
        x: Tensor,
        more: Tensor,
        layer: int,
        attend: Attend,
        add_norm: AddNorm,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Maps a residual stream x + more to the next one, returned in two parts as well.

        The sum is left to the next norm, which a device may fuse with it. All are [tokens, hidden];
        with `wanted`, the results are those of these tokens only, int64 [wanted].
        """
        if self.norm_first:
            x, y = add_norm(x, more, self.self_attn_layer_norm)
        else:
            x = y = x + more
        qkv = self.qkv_proj(y).unflatten(1, (3, self.heads, -1))
        values = attend(layer, qkv).flatten(1)
        if wanted is not None:
            x, values = x[wanted], values[wanted]
        attended = self.out_proj(values)
        if self.norm_first:
            x, y = add_norm(x, attended, self.final_layer_norm)
            return x, self.fc2(self.activation(self.fc1(y)))
        _, x = add_norm(x, attended, self.self_attn_layer_norm)
        _, x = add_norm(x, self.fc2(self.activation(self.fc1(x))), self.final_layer_norm)
        return x, torch.zeros_like(x)


class OptDecoder(nn.Module):
    """The language half of a BLIP-2 checkpoint."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = _embedding(config.vocab_size, hidden)
        self.embed_positions = _embedding(config.max_position_embeddings + POSITION_OFFSET, hidden)
        self.layers = nn.ModuleList(OptLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = (
            nn.LayerNorm(hidden, elementwise_affine=config.layer_norm_elementwise_affine)
            if config.do_layer_norm_before and not config._remove_final_layer_norm
            else nn.Identity()
        )
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> OptDecoder:
        """Loads the language model, and no other tensor, onto `device`.

        Raises:
            StartupError: A tensor is missing, has another shape, or the config is not supported.
        """
        with torch.device("meta"):
            decoder = cls(checkpoint.config.text_config).to(dtype).eval()
        allocate(decoder, device)
        if decoder.config.tie_word_embeddings:  # that untied them
            decoder.lm_head.weight = decoder.embed_tokens.weight
        checkpoint.load(decoder.checkpoint_tensors(), "language model")
        return decoder

    @property
    def head_dim(self) -> int:
        return int(self.config.hidden_size) // int(self.config.num_attention_heads)

    def replace_linears(self, make: MakeLinear) -> None:
        """Replaces the linear layers, and the activations after them where `make` fuses both."""
        name = self.config.activation_function
        for layer in self.layers:
            replace_with_activation(layer, "fc1", "activation", name, make)
        replace_linears(self, make)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Maps tensor names in the checkpoint to the parameters, or parts of them, to load into."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():  # lists a tied head once, as embedding
            if name.startswith("lm_head"):
                tensors[f"language_model.{name}"] = parameter
            elif ".qkv_proj." in name:
                for part, letter in zip(parameter.chunk(3), "qkv", strict=True):
                    own = name.replace("qkv_proj", f"self_attn.{letter}_proj")
                    tensors[f"language_model.model.decoder.{own}"] = part
            else:
                own = name.replace(".out_proj.", ".self_attn.out_proj.")
                tensors[f"language_model.model.decoder.{own}"] = parameter
        return tensors

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        attend: Attend,
        add_norm: AddNorm = add_norm,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Token or image embeddings [T, hidden] at int64 positions [T] -> hidden [T, hidden].

        With `wanted`, int64 [N], the result is [N, hidden], of these tokens: the others only leave
        their keys and values.
        """
        x: Tensor = embeddings
        more: Tensor = self.embed_positions(positions + POSITION_OFFSET)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x, more = layer(x, more, number, attend, add_norm, wanted if number == last else None)
        return x + more

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, hidden] -> float32 logits [N, vocabulary]."""
        logits: Tensor = self.lm_head(self.final_layer_norm(hidden))
        return logits.float()
