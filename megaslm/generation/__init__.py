"""Text from a model."""

from megaslm.generation.sampling import sample_tokens

__all__ = ["sample_tokens"]
