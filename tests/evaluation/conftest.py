"""A model so small that it is evaluated in no time."""

from collections.abc import Callable

import pytest

from megaslm.config import ModelConfig
from megaslm.data import Tokenizer


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """The config of a model with the vocabulary of a tokenizer; further switches as of ModelConfig."""

    def make(tokenizer: Tokenizer, context_length: int, **switches) -> ModelConfig:
        return ModelConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=context_length,
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            ffn_hidden_size=48,
            **switches,
        )

    return make
