"""What a device offers the model, in plain torch; `cpu/` and `cuda/` override what they do faster.

Chosen once, by `compute.devices.open_device`; whatever computes is handed a `Device` and asks no
further. The KV cache is one tensor, [layers, 2 (keys, values), slots, heads, head_dim].

Attention comes as functions that do what all layers share and return an `Attend`, which computes
one layer: it writes the keys and values of the step's tokens into their slots, then attends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve import machine
from blip2_serve.compute.drawing import keep_top_p
from blip2_serve.compute.mixed import MixedParts
from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.decoder import Attend, OptDecoder, add_norm

if TYPE_CHECKING:  # it imports transformers' modelling code, which no generator needs
    from blip2_serve.model.vision import ImageEncoder

# uint8 pixels [B, 3, S, S] in main memory -> image features [B, queries, hidden] on the device
Encode = Callable[[Tensor], Tensor]

# int64 [n, 2 + longest] in main memory -> float32 logits [n, vocabulary]; see `DecodeStep`
Decode = Callable[[Tensor], Tensor]


# The chunks of a step, some of them of prompts -> float32 logits, one row per completing chunk
MixedStep = Callable[[list[Chunk]], Tensor]


class DecodeStep(Protocol):
    """A step in which every sequence decodes one token."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """int64 [n, 2 + longest] on the device -> float32 logits [n, vocabulary].

        Each row has a token id, its position, and the KV slots of all positions up to it; what
        follows them is ignored. A row of zeros is padding: it writes to slot 0, which is nobody's.
        """


class Device:
    """Plain torch on any device: the reference that tests compare the others with."""

    asynchronous = False  # whether work is only queued, to be computed while Python goes on
    # Rows of logits that a token is drawn for at once. On a CPU, few of them stay in its cache.
    rows_at_once = 4

    def __init__(self, place: torch.device) -> None:
        self.place = place

    # -- memory --------------------------------------------------------------------------------

    def upload(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; work queued later sees it."""
        return tensor.to(self.place)

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts copying a tensor into main memory; call the result to wait for it."""
        return lambda: tensor.cpu()

    def download(self, tensor: Tensor) -> Tensor:
        """The tensor in main memory, once it is computed."""
        return self.fetch(tensor)()

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor in main memory that `upload` copies quickly."""
        return torch.empty(shape, dtype=dtype)

    def free_memory(self) -> int:
        """Bytes this process can still allocate on the device."""
        return machine.available_memory()

    def gpu_memory(self) -> tuple[int, int] | None:
        """Bytes of its GPU in use, by any process, and in all; None if it is no GPU."""
        return None

    def typical_len(self, max_len: int) -> int:
        """Tokens per sequence to reserve KV slots for, at most `max_len`."""
        return max_len

    # -- model ---------------------------------------------------------------------------------

    def prepare_decoder(self, decoder: OptDecoder, quantize: str | None = None) -> int:
        """Replaces the layers this device computes faster, with quantized weights if asked.

        `quantize` must have passed `devices.check_quantize`. Returns the multiple that a step's
        tokens should be padded to, for the sake of its linear layers.
        """
        return 1

    def prepare_encoder(
        self, encoder: ImageEncoder, max_batch_size: int, quantize: str | None = None
    ) -> Encode:
        """Makes the encoder fast for batches of 1 to `max_batch_size` and returns how to run it.

        `quantize` must have passed `devices.check_quantize`.
        """
        return lambda pixels: encoder(self.upload(pixels))

    def prepare_decode(
        self, step: DecodeStep, decoder: OptDecoder, *, max_num_seqs: int, max_len: int
    ) -> Decode:
        """Returns how to run `step` for up to `max_num_seqs` sequences of up to `max_len` tokens.

        The logits may be overwritten by the next call.
        """
        return lambda inputs: step(self.upload(inputs))

    def prepare_mixed(
        self,
        decoder: OptDecoder,
        kv: Tensor,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_len: int,
        pad_to: int,
    ) -> MixedStep:
        """Returns how to run steps of up to so many sequences and tokens in which some prefill.

        The logits may be overwritten by the next call.
        """
        return MixedParts(decoder, self, kv, pad_to).run

    # -- kernels -------------------------------------------------------------------------------

    def add_norm(self, x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """(x + more, its layer norm); all [tokens, hidden]."""
        return add_norm(x, more, norm)

    def keep_top_p(self, weights: Tensor, scores: Tensor, top_p: Tensor) -> Tensor:
        """Zeroes the weights of tokens that come after the likeliest `top_p` of each row.

        As `drawing.keep_top_p`, exactly: weights are integers.
        """
        return keep_top_p(weights, scores, top_p)

    def attend_decode(self, kv: Tensor, slots: Tensor, positions: Tensor) -> Attend:
        """One token of each of n sequences attends to itself and all tokens before it.

        `slots` is int64 [n, longest], `positions` int64 [n]; slots behind a token's own position
        are ignored.
        """
        own = slots.gather(1, positions[:, None])[:, 0]
        seen = torch.arange(slots.shape[1], device=slots.device) <= positions[:, None]
        slots, unseen = slots.where(seen, 0), ~seen[:, :, None, None]
        mask = seen[:, None, None]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kv[layer][:, own] = qkv[:, 1:].transpose(0, 1)
            keys, values = kv[layer][:, slots].masked_fill(unseen, 0).transpose(2, 3)
            query = qkv[:, 0, :, None]
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask)[:, :, 0]

        return attend

    def attend_prefill(self, kv: Tensor, slots: Tensor, count: int) -> Attend:
        """The first tokens of `count` sequences, equally many of each.

        `slots` is int64 [tokens], sequence after sequence.
        """

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kv[layer][:, slots] = qkv[:, 1:].transpose(0, 1)
            query, key, value = qkv.unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)
            attended = scaled_dot_product_attention(query, key, value, is_causal=True)
            return attended.transpose(1, 2).flatten(0, 1)

        return attend

    def attend_chunk(self, kv: Tensor, slots: Tensor, start: int) -> Attend:
        """The tokens of one sequence from `start` on; `slots`, int64, has all its positions."""
        positions = torch.arange(start, len(slots), device=slots.device)
        mask = torch.arange(len(slots), device=slots.device) <= positions[:, None]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kv[layer][:, slots[start:]] = qkv[:, 1:].transpose(0, 1)
            key, value = kv[layer].index_select(1, slots).transpose(1, 2)
            query = qkv[:, 0].transpose(0, 1)[None]
            attended = scaled_dot_product_attention(query, key[None], value[None], attn_mask=mask)
            return attended[0].transpose(0, 1)

        return attend


def prepare_thread(place: torch.device, threads: int | None) -> None:
    """Prepares this thread to compute: on a CPU it gives way to threads that serve.

    `threads` is how many torch uses when it is called from this one; None: all usable cores.

    Ray sets OMP_NUM_THREADS to the CPUs that the replica reserves, rounded up: 1. OpenMP keeps the
    number per calling thread, so every thread that computes must call this.
    """
    if place.type == "cpu":
        machine.give_way()
    torch.set_num_threads(threads or machine.cores())
