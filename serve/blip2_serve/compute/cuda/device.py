"""GPUs: Triton kernels, steps and batches captured as CUDA graphs, asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip2_serve.compute.base import Decode, DecodeStep, Device, Encode, MixedStep
from blip2_serve.compute.cuda import add_norm, decode_attention, linear
from blip2_serve.compute.cuda import top_p as top_p_kernel
from blip2_serve.compute.cuda.capture import Capture, cuda_capture
from blip2_serve.compute.cuda.fp8 import Fp8Products
from blip2_serve.compute.cuda.graphs import DecodeGraphs, EncoderGraphs
from blip2_serve.compute.cuda.mixed_graphs import MixedGraphs
from blip2_serve.compute.cuda.vision import FusedEncoder, Products, supported
from blip2_serve.errors import StartupError
from blip2_serve.model.decoder import Attend, OptDecoder
from blip2_serve.model.vision import ImageEncoder

# For images, cuDNN's attention is the fastest. It plans for each shape; the captured ones are few.
IMAGE_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class CudaDevice(Device):
    """Copies go through page-locked memory, from which the driver copies without being waited for.

    torch reuses page-locked memory, but not before the copies from it are done: nothing here has
    to keep a tensor alive.
    """

    asynchronous = True
    # torch sorts 2 to 127 rows as if they were one; more take several times as long.
    rows_at_once = 64

    def __init__(self, place: torch.device) -> None:
        super().__init__(place)
        self._decoding: Capture | None = None

    def upload(self, tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_cuda else tensor.pin_memory()
        return pinned.to(self.place, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = self.host_tensor(tuple(tensor.shape), tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.place))

        def wait() -> Tensor:
            copied.synchronize()  # not with the stream, which may have more to do by then
            return host

        return wait

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.place)[0]

    def gpu_memory(self) -> tuple[int, int] | None:
        free, capacity = torch.cuda.mem_get_info(self.place)
        return capacity - free, capacity

    def prepare_decoder(self, decoder: OptDecoder, quantize: str | None = None) -> int:
        decoder.replace_linears(linear.for_few_rows(decoder.lm_head))
        return super().prepare_decoder(decoder, quantize)

    def prepare_encoder(
        self, encoder: ImageEncoder, max_batch_size: int, quantize: str | None = None
    ) -> Encode:
        encode = fast_forward(encoder, quantize)
        size = encoder.vision_model.config.image_size
        with sdpa_kernel(IMAGE_ATTENTION, set_priority=True):
            return EncoderGraphs(encode, size, self, max_batch_size, cuda_capture()).run

    @property
    def _capture(self) -> Capture:
        """For all steps of a decoder: they run one at a time."""
        self._decoding = self._decoding or cuda_capture(priority=-1)
        return self._decoding

    def prepare_decode(
        self, step: DecodeStep, decoder: OptDecoder, *, max_num_seqs: int, max_len: int
    ) -> Decode:
        graphs = DecodeGraphs(
            step,
            self,
            max_num_seqs=max_num_seqs,
            max_len=max_len,
            vocabulary=decoder.config.vocab_size,
            capture=self._capture,
        )
        return graphs.run

    def prepare_mixed(
        self,
        decoder: OptDecoder,
        kv: Tensor,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_len: int,
        pad_to: int,  # noqa: ARG002 (graphs have sizes of their own)
    ) -> MixedStep:
        graphs = MixedGraphs(
            decoder,
            self,
            kv,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_len=max_len,
            capture=self._capture,
        )
        return graphs.run

    def add_norm(self, x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        if norm.elementwise_affine:
            return add_norm.add_norm(x, more, norm)
        return super().add_norm(x, more, norm)

    def keep_top_p(self, weights: Tensor, scores: Tensor, top_p: Tensor) -> Tensor:
        return top_p_kernel.keep_top_p(weights, scores, top_p)

    def attend_decode(self, kv: Tensor, slots: Tensor, positions: Tensor) -> Attend:
        return lambda layer, qkv: decode_attention.attend(qkv, kv[layer], slots, positions)


def fast_forward(encoder: ImageEncoder, quantize: str | None) -> Encode:
    """The encoder's forward in few kernels, or the encoder itself where it is unusual."""
    if supported(encoder):
        return FusedEncoder(encoder, Fp8Products() if quantize else Products())
    if quantize:
        raise StartupError(
            f"encoder.quantize: {quantize} is not supported for this checkpoint, whose image "
            "encoder has another activation than GELU: leave it out"
        )
    return encoder
