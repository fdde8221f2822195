"""A trained model for others: a folder that transformers, sentence-transformers and `--model` load, with its heads, and
a model card."""
