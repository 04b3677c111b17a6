"""Causal scaled dot-product attention through PyTorch's own fused backends (flash, cuDNN, memory-efficient, CPU flash).

y = softmax(q k^T / sqrt(D) + causal mask) v

Over a whole window, or within each of the documents that share it.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_FLASH, _CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
_OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_ORDERS = {"flash": [_FLASH, _CUDNN, *_OTHERS], "cudnn": [_CUDNN, _FLASH, *_OTHERS]}
_preference = contextlib.ExitStack()


class Documents(NamedTuple):
    """Where the documents of a batch [B, S] lie, in the one form that its attention reads; see `find_documents`."""

    bounds: Tensor | None = None
    """[N + 1] int32: where each of the N documents starts among the B S tokens, and B S behind the last."""
    mask: Tensor | None = None
    """[B, 1, S, S], added to the scores: 0 for the keys that a query sees, else -inf. In the type of the queries: SDPA
    would turn a bool into that in every layer, and keep each for the backward pass."""


def find_documents(positions: Tensor, num_documents: int | None, head_dim: int, dtype: torch.dtype) -> Documents:
    """The documents of a batch, for any number of `causal_attention` calls with heads of `head_dim` in `dtype`.

    positions: [B, S], integer: tokens since the start of the document. Each row starts one, and so does every 0.
    num_documents: how many zeros there are, or more. None: they are counted, for which the host waits for a GPU.
    """
    starts = positions == 0
    starts[:, 0] = True
    if not separates_by_flash(positions.device, head_dim, dtype):
        document = starts.cumsum(1)
        seen = (document[:, :, None] == document[:, None, :]).tril().unsqueeze(1)
        return Documents(mask=torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf))
    if num_documents is None:
        num_documents = int(starts.sum())
    # What is no start goes behind the last one: documents beyond those that exist are empty there.
    tokens = torch.arange(starts.numel(), dtype=torch.int32, device=starts.device)
    bounds = torch.where(starts.flatten(), tokens, starts.numel()).sort().values[:num_documents]
    return Documents(bounds=F.pad(bounds, (0, 1), value=starts.numel()))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Attention of queries [B, S, H, D] to keys and values [B, S, K, D] that are not after them, [B, S, H, D].

    K divides H: query head h reads key/value head h // (H / K).
    documents: a token attends to those of its own document alone. None: to all of its row.
    """
    if documents is not None and documents.bounds is not None:
        return _flash_within_documents(q, k, v, documents.bounds)
    mask = None if documents is None else documents.mask
    y = _grouped_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, is_causal=mask is None)
    return y.transpose(1, 2)


def attention_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries [B, S, H, D] to keys and values [B, K, T, D], which lie head by head, [B, S, H, D].

    mask: [B or 1, 1, S, T], added to the scores. None: every query sees every key.
    """
    if q.size(1) > 1:
        return _grouped_attention(q.transpose(1, 2), k, v, mask, is_causal=False).transpose(1, 2)
    # The query heads that share a key head are rows of one product: no key or value is copied or read twice, whatever
    # the backend knows of grouped heads.
    rows = q.squeeze(1).unflatten(1, (k.size(1), -1))
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).flatten(1, 2).unsqueeze(1)


def prefer_attention(name: str) -> None:
    """Which of PyTorch's fused attentions a GPU tries first from here on, in this process: "flash", "cudnn", or "auto",
    which is PyTorch's own order. Compiled code keeps what was preferred when it was compiled."""
    _preference.close()
    if name == "auto":
        return
    _preference.enter_context(sdpa_kernel(_ORDERS[name], set_priority=True))
    # The cache of AOTAutograd knows the call and not the order by which it is resolved. It is asked when a forward pass
    # is compiled, which is this thread's work, as its settings of torch are its own since torch 2.13. The thread in
    # which autograd has a backward pass compiled needs no tag: in that graph the kernel stands by its name.
    tag = f"{torch.compiler.config.cache_key_tag} attention={name}"
    _preference.enter_context(torch.compiler.config.patch(cache_key_tag=tag))


def attention_obstacle(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, length: int
) -> str | None:
    """Why "flash" or "cudnn" attention over `length` tokens does not run on `device`, found by one try; None: it does.

    heads, kv_heads, head_dim: of the queries, of keys and values, and the width of both.
    """
    if device.type != "cuda":
        return "it needs a GPU"
    q = torch.zeros(1, length, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
    k = torch.zeros(1, length, kv_heads, head_dim, dtype=dtype, device=device, requires_grad=True)

    def attend() -> None:
        with sdpa_kernel(_ORDERS[name][0]):
            causal_attention(q, k, k).sum().backward()

    return _refusal(name, attend)


def _refusal(name: str, attend: Callable[[], None]) -> str | None:
    """Why `attend` does not run with the backend `name` alone; None: it does. SDPA goes through its backends, with a
    warning for each and one for each reason against it, and then raises an error that names none."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            attend()
            return None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error)
    said = [str(warning.message).partition(" (Triggered internally")[0] for warning in found]
    headings = [
        i for i, line in enumerate(said) if line.lower().startswith(f"{name} attention kernel not used because")
    ]
    if headings and headings[0] + 1 < len(said):
        reason = said[headings[0] + 1]
    return reason.partition("\n")[0]


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Of queries [B, H, S, D] to keys and values [B, K, T, D], [B, H, S, D]."""
    queries_per_kv = q.size(1) // k.size(1)
    if queries_per_kv > 1 and _only_backend_for_equal_heads(q, mask):
        k, v = k.repeat_interleave(queries_per_kv, dim=1), v.repeat_interleave(queries_per_kv, dim=1)
    grouped = k.size(1) != q.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def _flash_within_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Flash attention over sequences of variable lengths: the op under torch.nn.attention.varlen, whose own signature
    changes from version to version of torch, which this one's does not. Grouped heads and strides are its own."""
    length = q.size(1)
    y, *_ = torch.ops.aten._flash_attention_forward.default(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, length, length,
        0.0, True, False,  # no dropout, causal, no debug mask
    )  # fmt: skip
    return y.unflatten(0, (-1, length))


def separates_by_flash(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether documents are kept apart by flash attention over each, or else by a mask of S x S."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return False
    capability = torch.cuda.get_device_capability(device)
    # The backward pass of wider heads needs the shared memory of the data-centre GPUs.
    widest = 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192
    # Not every build of torch has it.
    available = torch.backends.cuda.is_flash_attention_available()
    return available and capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= widest


def _only_backend_for_equal_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Where neither flash nor cuDNN runs (fp32, before sm_80, or with a mask), the memory-efficient backend is what is
    left, and it knows no grouped heads: without the copies PyTorch would hold the S x S scores."""
    if not q.is_cuda:
        return False
    return mask is not None or q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0)
