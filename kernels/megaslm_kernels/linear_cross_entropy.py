"""Cross-entropy of a linear layer's logits without ever holding the logits of the whole batch.

    loss = sum over rows i with target t_i >= 0 of  logsumexp_v(h_i . W_v) - h_i . W_{t_i}
    d loss / d logit_iv = softmax_iv - [v == t_i]

Rows are taken in chunks; loss and gradients of a chunk are computed together in the forward pass, so only one
chunk of fp32 logits exists at a time. The weight's gradient is accumulated over chunks in fp32: a bf16 sum loses
the small terms (linked to divergence in other implementations). Chunks are as large as a byte budget allows,
since many small matrix products are slow.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a row that has no loss (PyTorch's default)."""

CHUNK_BYTES = 256 * 2**20
"""Budget for one chunk of fp32 logits."""


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Sum over rows of the cross-entropy between `hidden @ weight.T` and `targets`, in nats, as an fp32 scalar.

    hidden: [N, E]; weight: [V, E], of the same type; targets: [N], int64, `IGNORE_INDEX` where there is no loss.
    vocab_size: rows of `weight` from this one on are padding and take no part (their gradient is zero).
    """
    vocab_size = weight.size(0) if vocab_size is None else vocab_size
    chunk_rows = max(1, chunk_bytes // (4 * weight.size(0)))
    want_grads = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, chunk_rows, want_grads)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, chunk_rows, want_grads):
        loss = hidden.new_zeros((), dtype=torch.float32)
        num_rows = hidden.size(0)
        one_chunk = num_rows <= chunk_rows
        grad_hidden = torch.empty_like(hidden) if want_grads else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_grads and not one_chunk else None
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            loss_rows, grad_logits = _chunk_loss(hidden[rows], weight, targets[rows], vocab_size, want_grads)
            loss += loss_rows
            if not want_grads:
                continue
            grad_hidden[rows] = grad_logits @ weight
            if one_chunk:
                grad_weight = grad_logits.T @ hidden
            else:
                grad_weight += grad_logits.T @ hidden[rows]
        if want_grads:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = (grad_hidden * grad_loss).to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None, None, None, None


def _chunk_loss(hidden, weight, targets, vocab_size, want_grads):
    """Loss sum of one chunk and the gradient of its logits (in hidden's type), which reuses the logits' memory."""
    logits = (hidden @ weight.T).float()
    logits[:, vocab_size:] = -torch.inf
    is_target = targets != IGNORE_INDEX
    index = targets.where(is_target, 0).unsqueeze(1)
    # log_softmax is one fused pass; logsumexp is four
    log_probs = logits.log_softmax(dim=1)
    loss = -log_probs.gather(1, index).squeeze(1).where(is_target, 0.0).sum()
    if not want_grads:
        return loss, None
    grad = log_probs.exp_()
    grad.scatter_add_(1, index, grad.new_full((), -1.0).expand_as(index))
    grad.mul_(is_target.unsqueeze(1))
    return loss, grad.to(hidden.dtype)
