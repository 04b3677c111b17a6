"""Text from a model."""

from megaslm.generation.cache import KeyValueCache
from megaslm.generation.generator import Generator
from megaslm.generation.options import Completion, GenerationOptions
from megaslm.generation.sampling import sample_tokens

__all__ = ["Completion", "GenerationOptions", "Generator", "KeyValueCache", "sample_tokens"]
