"""The DeepSpeed engine around the ELECTRA step."""
