"""The OPT decoder, over a ragged batch of tokens laid end to end.

All linear layers see one [tokens, hidden] matrix, whichever sequences the tokens belong to; only
attention needs to know, and it is handed in. So this module knows nothing of sequences, caches or
scheduling. Arithmetic follows transformers' `OPTForCausalLM`; q, k and v are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from blip2_serve.compute.cpu.linear import Pack, for_few_rows, pack_linears, pack_with_activation
from blip2_serve.errors import StartupError
from blip2_serve.model.checkpoint import Checkpoint

POSITION_OFFSET = 2  # OPT's table of positions starts with two rows that are never used

# (layer, queries, keys and values as [tokens, 3, heads, head_dim]) -> [tokens, heads, head_dim]
Attend = Callable[[int, Tensor], Tensor]

# (x, more, norm) -> (x + more, its norm)
AddNorm = Callable[[Tensor, Tensor, nn.LayerNorm], tuple[Tensor, Tensor]]


def add_norm(x: Tensor, more: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Wherever torch runs."""
    x = x + more
    return x, norm(x)


# transformers' table of them takes a second to import. OPT's checkpoints have the first.
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise StartupError(f"OPT with the activation {name!r} is not served")
    return _ACTIVATIONS[name]()


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
        self.activation = _activation(config.activation_function)
        self.fc2 = nn.Linear(config.ffn_dim, hidden, bias=bias)

    def forward(
        self, x: Tensor, more: Tensor, layer: int, attend: Attend, add_norm: AddNorm
    ) -> tuple[Tensor, Tensor]:
        """The layer's input, and its output, in two parts that are still to be added up."""
        if self.norm_first:
            x, y = add_norm(x, more, self.self_attn_layer_norm)
        else:
            x = y = x + more
        qkv = self.qkv_proj(y).unflatten(1, (3, self.heads, -1))
        attended = self.out_proj(attend(layer, qkv).flatten(1))
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
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.embed_positions = nn.Embedding(
            config.max_position_embeddings + POSITION_OFFSET, hidden
        )
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
        """Reads the language model only."""
        with torch.device("meta"):
            decoder = cls(checkpoint.config.text_config).to(dtype).eval()
        decoder.to_empty(device=device).requires_grad_(False)
        if decoder.config.tie_word_embeddings:  # to_empty has parted them
            decoder.lm_head.weight = decoder.embed_tokens.weight
        checkpoint.load(decoder.checkpoint_tensors(), "language model")
        return decoder

    def pack(self, pack: Pack = for_few_rows) -> None:
        """Packs the linear layers, where this build and the decoder's dtype and device allow it."""
        name = self.config.activation_function
        for layer in self.layers:
            pack_with_activation(layer, "fc1", "activation", name, pack)
        pack_linears(self, pack)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Name in the checkpoint -> (part of) the parameter that holds it."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():  # a tied head is listed once, as embedding
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
    ) -> Tensor:
        """Token (or image) embeddings [T, hidden] at positions [T] -> hidden states [T, hidden]."""
        x: Tensor = embeddings
        more: Tensor = self.embed_positions(positions + POSITION_OFFSET)
        for number, layer in enumerate(self.layers):
            x, more = layer(x, more, number, attend, add_norm)
        return x + more

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, hidden] -> float32 logits [N, vocabulary]."""
        logits: Tensor = self.lm_head(self.final_layer_norm(hidden))
        return logits.float()
