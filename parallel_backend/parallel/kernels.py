"""The attention kernels: PyTorch's own, without and with log-sum-exp, on CUDA and on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of every query over every key, unmasked: ``[B, S, H, D]`` each -> ``[B, S_query, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    # On Hopper cuDNN's kernel does about 1.8 times the work a second of the flash kernel at these shapes.
    if not torch.is_grad_enabled() and _kernel(q, k, v) == "cudnn":
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention`, and the natural log of the sum of exponentials of each query's scores.

    Returns:
        out ``[B, S_query, H, D]`` in the query's dtype and lse ``[B, S_query, H, 1]`` in fp32.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    aten, kernel = torch.ops.aten, _kernel(q, k, v)
    if kernel == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif kernel == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        # Its lse is padded to a multiple of 32 queries.
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    lse = lse.view(lse.shape[0], lse.shape[1], -1)[:, :, : q.shape[2]]
    return out.transpose(1, 2), lse.float().transpose(1, 2).unsqueeze(-1)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which kernel takes these ``[B, H, S, D]``: cpu, cudnn, flash, or efficient (fp32 on CUDA).

    The compiler cannot follow the question, so a compiled graph asks it once, for a few tokens like these.
    """
    if q.device.type == "cpu":
        return "cpu"
    if torch.compiler.is_compiling():
        return _kernel_for(q.dtype, q.shape[-1])
    return _cuda_kernel(q, k, v)


@torch._dynamo.assume_constant_result
def _kernel_for(dtype: torch.dtype, dim: int) -> str:
    x = torch.empty(1, 1, 64, dim, dtype=dtype, device="cuda")
    return _cuda_kernel(x, x, x)


def _cuda_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    params = SDPAParams(q, k, v, None, 0.0, False, False)
    if can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) else "efficient"
