"""What one optimizer step communicates, by formula: no model is built, and no process group.

Counted is what `count_traffic` counts: the collectives of one rank, and their payload in bytes.

Shapes: B sequences of a micro-batch, S sequence, E width, H query heads, K key/value heads, D head size,
F feed-forward width, V padded vocabulary, L blocks; n tensor-parallel ranks, N parameters of one rank.
"""

import math
from dataclasses import dataclass

from megaslm_kernels.linear_cross_entropy import chunk_limit, chunk_rows

from megaslm.config import ModelConfig

FP32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Layout:
    """How a step is cut over ranks and micro-batches.

    micro_batch_size: sequences of one forward pass on one rank; accumulation_steps: such passes of an optimizer step.
    precision: of weights and activations, and what gradients are reduced in: "fp32", "bf16" or "fp16".
    loss_chunk_bytes: budget for the logits of a chunk of the loss; None: that of the fused kernel.
    persistence_threshold: stage3_param_persistence_threshold: stage 3 keeps weights of so many elements on every rank.
    live_parameters: stage3_max_live_parameters: elements of weights that stage 3 has gathered at a time.
    reduce_bucket: reduce_bucket_size: elements of the gradients that stages 1 to 3 reduce together.
    prefetch_bucket: stage3_prefetch_bucket_size: elements of weights that stage 3 gathers together, ahead of their use.
    offload_optimizer, offload_parameters: whether they lie in the memory of the host.
    """

    micro_batch_size: int
    accumulation_steps: int
    seq_length: int
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    activation_checkpointing: bool = False
    precision: str = "bf16"
    loss_chunk_bytes: int | None = None
    persistence_threshold: int = 100_000
    live_parameters: int = 1_000_000_000
    reduce_bucket: int = 50_000_000
    prefetch_bucket: int = 50_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def group_size(self, group: str) -> int:
        """Ranks of the group "tensor" or "data"."""
        return {"tensor": self.tensor_parallel_size, "data": self.data_parallel_size}[group]


@dataclass(frozen=True)
class Collective:
    """The calls of one operation with one purpose in an optimizer step, and the bytes of their payloads together.

    group: "tensor" or "data".
    """

    purpose: str
    operation: str
    group: str
    calls: int
    bytes: int


def step_collectives(config: ModelConfig, layout: Layout) -> list[Collective]:
    """The collectives of an optimizer step on one rank, without those of a single number (norms, overflow)."""
    found = _tensor_parallel(config, layout) if layout.tensor_parallel_size > 1 else []
    return found + (_zero(config, layout) if layout.data_parallel_size > 1 else [])


def rank_parameters(config: ModelConfig, tensor_parallel_size: int = 1) -> list[int]:
    """Elements of each parameter that one rank has, tied ones once; in no particular order."""
    n = tensor_parallel_size
    vocabulary = config.padded_vocab_size * config.hidden_size // n
    tables = [vocabulary] * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        tables.append(config.context_length * config.hidden_size)
    return tables + _norm(config) + config.num_layers * _block_parameters(config, n)


def _norm(config: ModelConfig) -> list[int]:
    return [config.hidden_size] * (2 if config.norm == "layernorm" and config.bias else 1)


def _keys_are_whole(config: ModelConfig, n: int) -> bool:
    """Whether every rank has all keys and values, there being fewer heads of them than ranks."""
    return config.num_kv_heads % n > 0


def _block_parameters(config: ModelConfig, n: int) -> list[int]:
    width, heads = config.hidden_size, config.head_dim * config.num_heads
    keys_and_values = 2 * config.head_dim * config.num_kv_heads
    inner = config.ffn_hidden_size * (2 if config.feed_forward == "swiglu" else 1)
    whole = _keys_are_whole(config, n)
    outputs = [heads // n, keys_and_values] if whole else [(heads + keys_and_values) // n]  # of the projection
    outputs.append(inner // n)
    found = [rows * width for rows in outputs] + [width * heads // n, width * config.ffn_hidden_size // n]
    if config.bias:
        found += [*outputs, width, width]
    if config.qk_norm:
        found += [config.head_dim] * 2
    return found + 2 * _norm(config)


def _partial_gradients(config: ModelConfig, layout: Layout) -> list[int]:
    """Elements of the weights that all ranks have whole and of whose gradient each computes a part."""
    block, last = [], []
    if _keys_are_whole(config, layout.tensor_parallel_size):
        keys_and_values = 2 * config.head_dim * config.num_kv_heads
        block += [keys_and_values * config.hidden_size] + [keys_and_values] * config.bias
    if config.qk_norm:
        block += [config.head_dim] * 2
    if layout.sequence_parallel:
        block += 2 * _norm(config) + [config.hidden_size] * (2 * config.bias)
        last = _norm(config)
    return config.num_layers * block + last


def _tensor_parallel(config: ModelConfig, layout: Layout) -> list[Collective]:
    """Per micro-batch, of the stream x, [B, S, E] (arXiv:1909.08053, arXiv:2205.05198):

        a block     enters two column-parallel layers and leaves two row-parallel ones: 2 all-reduces of x forward, 2
                    backward. Recomputed, it stops before the last one, whose result the backward pass does not need.
        embedding   1, forward; head: 1, backward
        loss        3 statistics of every token, in fp32, gathered from n ranks; one call a chunk
        weights     those that every rank has whole and computes a part of the gradient of, summed in fp32

    Under sequence parallelism each all-reduce of x is an all-gather and a reduce-scatter, the one forward where the
    other is backward. The two column-parallel layers of a block gather once more in the backward pass, for the
    gradients of their weights.
    """
    n, sharded, recomputes = layout.tensor_parallel_size, layout.sequence_parallel, layout.activation_checkpointing
    tokens = layout.micro_batch_size * layout.seq_length
    stream = tokens * config.hidden_size * BYTES[layout.precision]
    found = []

    def add(purpose: str, operation: str, calls: int, payload: int) -> None:
        steps = layout.accumulation_steps
        if calls:
            found.append(Collective(purpose, operation, "tensor", steps * calls, steps * payload))

    def add_streams(purpose: str, operation: str, calls: int) -> None:
        add(purpose, operation, calls, calls * stream)

    blocks = config.num_layers
    if not sharded:
        add_streams("blocks", "all_reduce", 4 * blocks)
        add_streams("recomputation", "all_reduce", blocks * recomputes)
        add_streams("embedding", "all_reduce", 1)
        add_streams("head", "all_reduce", 1)
    else:
        add_streams("blocks", "all_gather", 6 * blocks)
        add_streams("blocks", "reduce_scatter", 4 * blocks)
        add_streams("head", "all_gather", 1)
        add_streams("head", "reduce_scatter", 1)
        add_streams("recomputation", "all_gather", 2 * blocks * recomputes)
        add_streams("recomputation", "reduce_scatter", blocks * recomputes)
        # Learned positions are added to all tokens, which are split then.
        add_streams("embedding", "all_reduce" if config.position == "learned" else "reduce_scatter", 1)
        add_streams("embedding", "all_gather", 1)
    row_bytes = config.padded_vocab_size // n * BYTES[layout.precision]
    chunks = math.ceil(tokens / chunk_rows(tokens, chunk_limit(row_bytes, layout.loss_chunk_bytes)))
    add("loss", "all_gather", chunks, n * 3 * tokens * FP32_BYTES)
    partial = _partial_gradients(config, layout)
    add("weights", "all_reduce", len(partial), sum(partial) * FP32_BYTES)
    return found


def _zero(config: ModelConfig, layout: Layout) -> list[Collective]:
    """Of a rank's N parameters (arXiv:1910.02054), as DeepSpeed 0.19.8 does it:

        stage 0   all-reduces the gradient once
        stage 1   so too, where a reduce-scatter would do, and all-gathers the weights once
        stage 2   all-reduces the gradient of every micro-batch, and all-gathers the weights once
        stage 3   per micro-batch reduce-scatters the gradient and all-gathers the weights, and for the backward pass
                  once more those that it let go of. Weights under the threshold stay, and are gathered once a step.

    The bytes that stage 3 gathers are a lower bound, and up to a block's weights more a micro-batch were measured: its
    prefetcher lets go of nothing that it has seen to come again, so that the weights live at the end of the forward
    pass are those that it holds for the backward pass. Without it (stage3_prefetch_bucket_size 0) only those are held
    that come again within stage3_max_reuse_distance: half as many, or where blocks are recomputed a third.

    Left out is the padding of partitions to a multiple of the ranks. Calls are the least possible, since DeepSpeed cuts
    gradients into buckets of its own (`reduce_bucket_size`); but those of stage 3's gathers the most: one for each
    weight, two where it is let go. The prefetcher takes several together if they fit into its bucket.
    """
    sizes = rank_parameters(config, layout.tensor_parallel_size)
    total, element = sum(sizes), BYTES[layout.precision]
    steps = layout.accumulation_steps
    groups = 2  # of parameters: those that decay, and vectors
    if layout.zero_stage == 0:
        return [Collective("gradients", "all_reduce", "data", 1, total * element)]
    if layout.zero_stage < 3:
        times = steps if layout.zero_stage == 2 else 1
        return [
            Collective("gradients", "all_reduce", "data", times, times * total * element),
            Collective("weights", "all_gather", "data", groups, total * element),
        ]
    large = [size for size in sizes if size > layout.persistence_threshold]
    share_again = max(0, 1 - layout.live_parameters / sum(large)) if large else 0
    calls = steps * math.ceil(len(large) * (1 + share_again)) + len(sizes) - len(large)
    gathered = steps * round(sum(large) * (1 + share_again)) + total - sum(large)
    return [
        Collective("gradients", "reduce_scatter", "data", steps, steps * total * element),
        Collective("weights", "all_gather", "data", calls, gathered * element),
    ]
