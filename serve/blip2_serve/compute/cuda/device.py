"""GPUs: Triton kernels, steps and batches captured as CUDA graphs, asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip2_serve.compute.base import Decode, DecodeStep, Device, Encode
from blip2_serve.compute.cuda import add_norm, decode_attention
from blip2_serve.compute.cuda.capture import cuda_capture
from blip2_serve.compute.cuda.graphs import DecodeGraphs, EncoderGraphs
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

    # torch sorts 2 to 127 rows as if they were one; more take several times as long.
    rows_at_once = 64

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
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.place)[0]

    def gpu_memory(self) -> tuple[int, int] | None:
        free, capacity = torch.cuda.mem_get_info(self.place)
        return capacity - free, capacity

    def prepare_encoder(self, encoder: ImageEncoder, max_batch_size: int) -> Encode:
        with sdpa_kernel(IMAGE_ATTENTION, set_priority=True):
            return EncoderGraphs(encoder, self, max_batch_size, cuda_capture()).run

    def prepare_decode(
        self, step: DecodeStep, decoder: OptDecoder, *, max_num_seqs: int, max_len: int
    ) -> Decode:
        # cuDNN plans for each new shape, and prompts come in any length. torch has this switch for
        # the whole process only.
        torch.backends.cuda.enable_cudnn_sdp(False)
        graphs = DecodeGraphs(
            step,
            self,
            max_num_seqs=max_num_seqs,
            max_len=max_len,
            vocabulary=decoder.config.vocab_size,
            capture=cuda_capture(priority=-1),
        )
        return graphs.run

    def add_norm(self, x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        if norm.elementwise_affine:
            return add_norm.add_norm(x, more, norm)
        return super().add_norm(x, more, norm)

    def attend_decode(self, kv: Tensor, slots: Tensor, positions: Tensor) -> Attend:
        return lambda layer, qkv: decode_attention.attend(qkv, kv[layer], slots, positions)
