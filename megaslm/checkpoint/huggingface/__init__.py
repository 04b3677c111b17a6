"""To and from transformers: which architecture, which parameters, import, export, and the proof of both."""
