"""CPUs: packed linear layers, and attention over the KV slots where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from blip2_serve.compute.base import Decode, DecodeStep, Device, Encode
from blip2_serve.compute.cpu import linear, paged_attention
from blip2_serve.compute.cpu.int8 import quantize_decoder
from blip2_serve.model.decoder import Attend, OptDecoder

if TYPE_CHECKING:
    from blip2_serve.model.vision import ImageEncoder


class CpuDevice(Device):
    USUAL_LEN = 512  # tokens: more than a chat of ten turns about an image has

    def typical_len(self, max_len: int) -> int:
        """Main memory is shared with others, so no more than sequences usually need."""
        return min(max_len, self.USUAL_LEN)

    def prepare_decoder(self, decoder: OptDecoder, quantize: str | None = None) -> int:
        if quantize:
            quantize_decoder(decoder)
            return 1
        make, pad_to = linear.for_decode(decoder.embed_tokens.weight.dtype)
        decoder.replace_linears(make)
        return pad_to

    def prepare_encoder(
        self, encoder: ImageEncoder, max_batch_size: int, quantize: str | None = None
    ) -> Encode:
        # Only here, as it imports transformers' modelling code, which no generator needs.
        from blip2_serve.compute.cpu.vision import pack_vision

        pack_vision(encoder)
        return super().prepare_encoder(encoder, max_batch_size, quantize)

    def prepare_decode(
        self, step: DecodeStep, decoder: OptDecoder, *, max_num_seqs: int, max_len: int
    ) -> Decode:
        # Compiles now: the first request would wait for it.
        paged_attention.kernel(decoder.embed_tokens.weight.dtype, decoder.head_dim)
        return super().prepare_decode(step, decoder, max_num_seqs=max_num_seqs, max_len=max_len)

    def attend_decode(self, kv: Tensor, slots: Tensor, positions: Tensor) -> Attend:
        lengths = (positions + 1).tolist()
        own = [row[:length] for row, length in zip(slots.numpy(), lengths, strict=True)]
        return paged_attention.attend_decode(own, kv)
