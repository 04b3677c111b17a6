"""The network: one pre-norm decoder whose switches make it a llama, qwen3, gpt2 or gpt_neox.

- grouped-query attention through PyTorch's scaled_dot_product_attention, head size free of the width
- rotary (theta, fraction, scaling: see rotary.py) or learned positions; optional RMS norm of queries and keys
- SwiGLU or GELU feed-forward; sequential or parallel residual; biases or none; tied or untied output head
- packed query/key/value and gate/up projections: fewer, larger matrix products and fewer parameters to manage
- a head that computes the loss itself, in chunks, so that full logits never exist in training

Norms, rotation, gate and loss are computed by the `Ops` that the network is built with: PyTorch's or fused kernels.
Plain PyTorch otherwise: nothing here knows of ranks, devices or DeepSpeed. The number of heads is read off the width of
the projection, so that an outer layer may slice the weights by heads.

Shapes: B batch, S sequence, H query heads, K key/value heads, D head size, E width, F feed-forward width,
V padded vocabulary, N = B S rows, R rotated channels of a head.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from megaslm_kernels import REFERENCE, Documents, Ops, causal_attention, find_documents
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaslm.config import ModelConfig
from megaslm.model.rotary import Rotary, RotaryTable


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + branch, its normalisation): the addition costs nothing where it is fused."""
        if branch is None:
            return x, self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.add_rms_norm(branch, x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with the interface of RMSNorm."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        return x, super().forward(x)


def build_norm(config: ModelConfig, ops: Ops) -> RMSNorm | LayerNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps, ops)
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without its own initial draw, which on the meta device costs a second of imports."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class LayerCache(Protocol):
    """Keys and values that one block has computed."""

    def attend(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        """Keep `k` and `v`, and give the attention of `q` to all that is kept, causally: [B, S, H, D]."""


class Cache(Protocol):
    """What the network has computed of the tokens before these, for generation (megaslm.generation.KeyValueCache)."""

    layers: list[LayerCache]

    def extend(self, length: int) -> tuple[int, Tensor | None]:
        """Make room for `length` more tokens: their first position, and where rows differ the positions [B, S]."""


class QueryKeyNorm(nn.Module):
    """RMS norm of every query and key head, and their rotation. It owns both weights, so that ZeRO-3, which gathers the
    weights of the module that runs, has them for the op that needs them together."""

    def __init__(self, head_dim: int, eps: float, ops: Ops):
        super().__init__()
        self.q_weight = nn.Parameter(torch.ones(head_dim))
        self.k_weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps
        self.ops = ops

    def forward(self, q_BSHD: Tensor, k_BSKD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        if rotary is None:
            q_BSHD = self.ops.rms_norm(q_BSHD, self.q_weight, self.eps)
            return q_BSHD, self.ops.rms_norm(k_BSKD, self.k_weight, self.eps)
        cos, sin, positions_BS = rotary
        return self.ops.qk_norm_rotary(q_BSHD, k_BSKD, self.q_weight, self.k_weight, cos, sin, self.eps, positions_BS)


class Attention(nn.Module):
    """Causal self-attention. The packed projection's rows are all queries, then all keys, then all values."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        self.qkv = nn.Linear(
            config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * self.head_dim, bias=config.bias
        )
        self.out = nn.Linear(config.num_heads * self.head_dim, config.hidden_size, bias=config.bias)
        self.qk_norm = QueryKeyNorm(self.head_dim, config.norm_eps, ops) if config.qk_norm else None
        self.ops = ops

    def forward(
        self, x_BSE: Tensor, rotary: Rotary | None, documents: Documents | None, cache: LayerCache | None = None
    ) -> Tensor:
        qkv = self.qkv(x_BSE).unflatten(-1, (-1, self.head_dim))
        kv_heads = qkv.size(2) // (self.queries_per_kv + 2)
        q_BSHD, k_BSKD, v_BSKD = qkv.split((kv_heads * self.queries_per_kv, kv_heads, kv_heads), dim=2)
        if self.qk_norm is not None:
            q_BSHD, k_BSKD = self.qk_norm(q_BSHD, k_BSKD, rotary)
        elif rotary is not None:
            q_BSHD, k_BSKD = self.ops.rotary(q_BSHD, k_BSKD, *rotary)
        if cache is not None:
            return self.out(cache.attend(q_BSHD, k_BSKD, v_BSKD).flatten(2))
        return self.out(causal_attention(q_BSHD, k_BSKD, v_BSKD, documents).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x). The packed projection's rows are all of gate, then all of up."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.bias)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down(self.ops.swiglu(self.gate_up(x_BSE)))


class GELUFeedForward(nn.Module):
    """down(gelu(up x)), exact or by tanh."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.bias)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.bias)
        self.approximate = "tanh" if config.feed_forward == "gelu_tanh" else "none"

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSE), approximate=self.approximate))


class Block(nn.Module):
    """Attention and feed-forward around the residual stream, one after the other or side by side.

    The stream enters and leaves as two terms, x and the last branch, whose sum the next norm takes.
    """

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attention_norm = build_norm(config, ops)
        self.attention = Attention(config, ops)
        self.feed_forward_norm = build_norm(config, ops)
        self.feed_forward = SwiGLU(config, ops) if config.feed_forward == "swiglu" else GELUFeedForward(config)

    def forward(
        self,
        x_BSE: Tensor,
        branch_BSE: Tensor | None,
        rotary: Rotary | None,
        documents: Documents | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        x_BSE, normed_BSE = self.attention_norm(x_BSE, branch_BSE)
        attended_BSE = self.attention(normed_BSE, rotary, documents, cache)
        if self.parallel_residual:
            _, normed_BSE = self.feed_forward_norm(x_BSE)
            return x_BSE, attended_BSE + self.feed_forward(normed_BSE)
        x_BSE, normed_BSE = self.feed_forward_norm(x_BSE, attended_BSE)
        return x_BSE, self.feed_forward(normed_BSE)


class Decoder(nn.Module):
    """Tokens to hidden states: what every objective builds on."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.context_length = config.context_length
        self.head_dim = config.head_dim
        self.activation_checkpointing = False
        self.embedding = empty_embedding(config.padded_vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.position_embedding = empty_embedding(config.context_length, config.hidden_size) if learned else None
        self.rotary_table = None if learned else RotaryTable(config)
        self.stream = nn.Identity()  # what enters the first block passes it: an outer layer may take its place
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.num_layers))
        self.norm = build_norm(config, ops)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        num_documents: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, S, E] after the last norm, of token ids [B, S] with S <= context_length.

        positions_BS, num_documents, cache: as in `LanguageModel.forward`.
        """
        start, length, documents = 0, tokens_BS.size(1), None
        assert length <= self.context_length, f"{length} tokens do not fit in a context of {self.context_length}"
        x_BSE = self.embedding(tokens_BS)
        if positions_BS is not None:
            documents = find_documents(positions_BS, num_documents, self.head_dim, x_BSE.dtype)
        if cache is not None:
            assert positions_BS is None and not self.training, "a cache is for generation: it has its own positions"
            start, positions_BS = cache.extend(length)
        rotary = None
        if self.position_embedding is None:
            rotary = self.rotary_table(length, positions_BS, start)
        elif positions_BS is None:
            x_BSE = x_BSE + self.position_embedding(torch.arange(start, start + length, device=tokens_BS.device))
        else:
            x_BSE = x_BSE + self.position_embedding(positions_BS)
        x_BSE, branch_BSE = self.stream(x_BSE), None
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                # One tensor is kept for each block, not two terms of a sum.
                x_BSE = x_BSE if branch_BSE is None else x_BSE + branch_BSE
                # Non-reentrant: the reentrant form breaks ZeRO-2 and 3 where a module runs twice.
                # Nothing in a block draws random numbers, so no generator's state is kept.
                x_BSE, branch_BSE = checkpoint(
                    block, x_BSE, None, rotary, documents, use_reentrant=False, preserve_rng_state=False
                )  # fmt: skip
            else:
                layer = None if cache is None else cache.layers[i]
                x_BSE, branch_BSE = block(x_BSE, branch_BSE, rotary, documents, layer)
        return self.norm(x_BSE, branch_BSE)[1]


class LanguageModelHead(nn.Module):
    """The output layer and its loss in one module, so that ZeRO-3 gathers the weight exactly while it is used."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.z_loss = 0.0
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.hidden_size))
        self.ops = ops

    def forward(self, hidden_BSE: Tensor, targets_BS: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., vocab_size] (padding cropped), or with targets what `LanguageModel.forward` returns."""
        if targets_BS is None:
            return F.linear(hidden_BSE, self.weight)[..., : self.vocab_size]
        return self.ops.linear_cross_entropy(
            hidden_BSE.flatten(0, -2), self.weight, targets_BS.flatten(), self.vocab_size, self.z_loss
        )


class LanguageModel(nn.Module):
    """Decoder and head. `build_model` (initialization.py) makes one with its initial weights."""

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config, ops)
        self.head = LanguageModelHead(config, ops)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let head and embedding share one matrix where the config says so; `to_empty` parts them again."""
        if self.config.tie_embeddings:
            self.head.weight = self.decoder.embedding.weight

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        num_documents: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, S, vocab_size] of token ids [B, S] (int64); or with `targets_BS` the objective, to be
        differentiated, and the loss, to be reported: fp32 scalars, sums over the targets that are not -100. The loss is
        the cross-entropy in nats; the objective adds z_loss log^2(sum of exp(logits)) (arXiv:2204.02311).

        positions_BS: [B, S] int32, tokens since the start of the document: a token sees its own document alone, as if
            each were run by itself. A row starts at 0. None: every row is one document.
        num_documents: how many positions are 0. None: counted, for which the host waits for a GPU.
        cache: the tokens go on where its own end, and are kept in it.
        """
        return self.head(self.decoder(tokens_BS, positions_BS, num_documents, cache), targets_BS)
