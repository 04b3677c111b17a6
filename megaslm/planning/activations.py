"""What a forward pass keeps for the backward pass, in bytes, by formula: no model is built.

Counted is what autograd saves, each storage once, as `torch.autograd.graph.saved_tensors_hooks` sees it: a test
compares the two, exactly. Weights and the rotary table are not among it. Backends are those of `megaslm_kernels`:
"reference" stands for the CPU, where F.rms_norm is made of several operations, "triton" for CUDA and its flash
attention.

Per token, in elements of the run's type (e bytes), but * in fp32, of a block of width E, with H query and K key/value
heads of D channels and a feed-forward width F:

    RMS norm, twice         triton      E (the sum)  1*                     E (the result)
                            reference   E* (the sum, wide)  1*  E* (normalised)  E
    layer norm, twice       E (the sum)  2 statistics                       E
    projection              (H + 2 K) D, packed: values are a view of it, and keep all of it
    QK norm                 reference   (H + K) D*, wide  (H + K)*  (H + K) D*; triton: nothing, it reads the projection
    rotated or normalised   (H + K) D
    attention               H D (the result)  H* (log of the softmax's denominator)
    SwiGLU                  2 F  F (the result); reference: F more, silu(gate)
    GELU                    F  F

In fp32 what is wide is the tensor itself. A parallel residual has one sum, not two. n tensor-parallel ranks divide H, K
(down to one head) and F, and sequence parallelism the tokens of the norms. torch.compile is not in the formula: under
Triton, whose ops it does not look into, it keeps what eager mode does, elsewhere less, but what tensor parallelism
gathers.
"""

from dataclasses import dataclass

from megaslm.config import ModelConfig
from megaslm.parallel import BYTES, Layout

WIDE = 4
"""Bytes of an element in fp32."""


@dataclass(frozen=True)
class Sizes:
    """Sizes on one rank. tokens: of a micro-batch; own_tokens: those that it has between the matrices."""

    tokens: int
    own_tokens: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    element: int

    @classmethod
    def of(cls, config: ModelConfig, layout: Layout) -> "Sizes":
        n, tokens = layout.tensor_parallel_size, layout.micro_batch_size * layout.seq_length
        return cls(
            tokens,
            tokens // n if layout.sequence_parallel else tokens,
            config.num_heads // n,
            max(1, config.num_kv_heads // n),
            config.ffn_hidden_size // n,
            config.padded_vocab_size // n,
            BYTES[layout.precision],
        )


def block_bytes(config: ModelConfig, layout: Layout, backend: str) -> int:
    """What one block keeps of one micro-batch where it is not recomputed, its input included."""
    sizes = Sizes.of(config, layout)
    attention = sizes.tokens * _attention(config, sizes, backend)
    feed_forward = sizes.tokens * _feed_forward(config, sizes, backend)
    norms = 2 * norm_bytes(config, layout, backend)
    if config.parallel_residual:
        # Both norms read one tensor, of which the reference makes two wide copies.
        norms -= 0 if _copies_wide(config, sizes, backend) else sizes.own_tokens * config.hidden_size * sizes.element
    return attention + feed_forward + norms


def norm_bytes(config: ModelConfig, layout: Layout, backend: str) -> int:
    """What a norm of the residual stream keeps, its input and its result included."""
    sizes, width = Sizes.of(config, layout), config.hidden_size
    result = width * sizes.element
    if config.norm == "layernorm":
        # The statistics are in fp32 on CUDA, in the run's type on the CPU.
        per_token = width * sizes.element + 2 * (WIDE if backend == "triton" else sizes.element)
    elif backend == "triton":
        per_token = width * sizes.element + WIDE
    else:
        per_token = 2 * width * WIDE + WIDE
    return sizes.own_tokens * (per_token + result)


def stream_bytes(config: ModelConfig, layout: Layout) -> int:
    """The residual stream of a micro-batch: what is kept of a block that is recomputed."""
    sizes = Sizes.of(config, layout)
    return sizes.own_tokens * config.hidden_size * sizes.element


def mask_bytes(layout: Layout, backend: str) -> int:
    """The mask that keeps documents apart, for all blocks: S x S a sequence, but where flash attention, which has no
    fp32, takes bounds."""
    return (
        0
        if backend == "triton" and layout.precision != "fp32"
        else layout.micro_batch_size * layout.seq_length**2 * BYTES[layout.precision]
    )


def _copies_wide(config: ModelConfig, sizes: Sizes, backend: str) -> bool:
    return config.norm == "rmsnorm" and backend == "reference" and sizes.element != WIDE


def _attention(config: ModelConfig, sizes: Sizes, backend: str) -> int:
    """Bytes of a token."""
    d, element = config.head_dim, sizes.element
    rotated_heads = sizes.heads + sizes.kv_heads
    kept = (sizes.heads + 2 * sizes.kv_heads) * d * element
    if config.qk_norm or config.position == "rope":
        kept += rotated_heads * d * element
    if config.qk_norm and backend == "reference":
        kept += rotated_heads * (d * WIDE + WIDE) + (rotated_heads * d * WIDE if element != WIDE else 0)
    if config.qk_norm and backend == "triton" and config.position == "learned":
        kept += rotated_heads * WIDE
    if backend == "triton" and element == WIDE and sizes.heads > sizes.kv_heads:
        kept += 2 * sizes.heads * d * element  # keys and values repeated: see attention.py
    return kept + sizes.heads * (d * element + WIDE)


def _feed_forward(config: ModelConfig, sizes: Sizes, backend: str) -> int:
    """Bytes of a token."""
    if config.feed_forward == "swiglu":
        return (4 if backend == "reference" else 3) * sizes.inner * sizes.element
    return 2 * sizes.inner * sizes.element
