"""What a model costs: parameters and floating-point operations, by formula (no model is built).

Sizes are those of the true vocabulary: the padding of the embedding is left out.
"""

from megaslm.config import ModelConfig


def _block_matmul_parameters(config: ModelConfig) -> int:
    """Weights of one block that are used in a matrix product."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    matrices = 3 if config.feed_forward == "swiglu" else 2
    return attention + matrices * config.hidden_size * config.ffn_hidden_size


def _vector_parameters(config: ModelConfig) -> int:
    """Norm weights and biases of the whole model."""
    norm = config.hidden_size * (2 if config.norm == "layernorm" and config.bias else 1)
    block = 2 * norm
    if config.qk_norm:
        block += 2 * config.head_dim
    if config.bias:
        inner = config.ffn_hidden_size * (2 if config.feed_forward == "swiglu" else 1)
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        block += qkv + inner + 2 * config.hidden_size
    return config.num_layers * block + norm


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters, tied ones once."""
    embedding = config.vocab_size * config.hidden_size
    positions = config.context_length * config.hidden_size if config.position == "learned" else 0
    head = 0 if config.tie_embeddings else embedding
    blocks = config.num_layers * _block_matmul_parameters(config)
    return embedding + positions + blocks + head + _vector_parameters(config)


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that are used in a matrix product, once each: the output head is among them, the input embedding not."""
    return config.num_layers * _block_matmul_parameters(config) + config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, seq_length: int, causal: bool = False) -> float:
    """Floating-point operations of forward and backward for one token: 6 N_matmul + 12 L H D S.

    N_matmul counts every weight that is used in a matrix product once, the output head included and the input
    embedding not. The second term is attention over the full sequence, the usual definition (PaLM, arXiv:2204.02311,
    appendix B); with `causal` it is halved, which is what a causal kernel really does. Recomputation is not counted.
    """
    matmul = matmul_parameters(config)
    attention = config.num_layers * config.num_heads * config.head_dim * seq_length
    return 6.0 * matmul + (6.0 if causal else 12.0) * attention
