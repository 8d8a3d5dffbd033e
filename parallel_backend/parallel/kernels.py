"""The attention kernels: PyTorch's own, without and with log-sum-exp, on CUDA and on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

# On Hopper cuDNN's kernel does about 1.8 times the work a second of the flash kernel at these shapes.
_CUDA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of every query over every key, unmasked: ``[B, S, H, D]`` each -> ``[B, S_query, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cuda":
        with sdpa_kernel(_CUDA_ORDER, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention`, and the natural log of the sum of exponentials of each query's scores.

    Returns:
        out ``[B, S_query, H, D]`` in the query's dtype and lse ``[B, S_query, H, 1]`` in fp32.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        params = SDPAParams(q, k, v, None, 0.0, False, False)
        if can_use_cudnn_attention(params):
            out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        elif can_use_flash_attention(params):
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        else:
            # fp32 on CUDA; its lse is padded to a multiple of 32 queries.
            out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    lse = lse.view(lse.shape[0], lse.shape[1], -1)[:, :, : q.shape[2]]
    return out.transpose(1, 2), lse.float().transpose(1, 2).unsqueeze(-1)
