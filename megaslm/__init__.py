"""megaslm: pretrain small language models from raw text to a Hugging Face checkpoint, on any machine."""

__version__ = "0.1.0"
