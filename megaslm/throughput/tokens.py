"""Token files to measure with, where a user gives none."""

import numpy as np

from megaslm.data import TokenFileWriter

SEED = 1234
MEAN_LENGTH = 500  # tokens of a document
FEWEST = 100  # documents, which a split divides
CHUNK = 1 << 20
MOST = 1 << 24  # tokens; a run that reads more reads them again


def write_tokens(prefix: str, vocab_size: int, num_tokens: int) -> None:
    """A token file of at least `num_tokens` tokens, or of MOST, in documents of about MEAN_LENGTH.

    The ids are drawn so that the k-th is about as frequent as 1 / k (Zipf's law, as in text). Which ids they are makes
    a step neither faster nor slower; that they lie in a file, and are read and shuffled as a run's are, may.
    """
    generator = np.random.default_rng(SEED)
    num_tokens = max(min(num_tokens, MOST), FEWEST * MEAN_LENGTH)
    with TokenFileWriter(prefix, vocab_size) as writer:
        while writer.num_tokens < num_tokens:
            left = min(num_tokens - writer.num_tokens, CHUNK)
            lengths = 1 + generator.poisson(MEAN_LENGTH - 1, 1 + left // MEAN_LENGTH)
            draws = generator.random(lengths.sum())
            # The power is below vocab_size + 1 but for rounding.
            ids = np.minimum((vocab_size + 1) ** draws, vocab_size).astype(np.int64) - 1
            writer.extend_flat(ids, lengths)
        writer.finish()
