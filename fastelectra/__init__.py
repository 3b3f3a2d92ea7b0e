"""ELECTRA pre-training: raw text in, a discriminator that Hugging Face loads out."""

__version__ = "0.1.0"
