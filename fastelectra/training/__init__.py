"""The ELECTRA step as a run: engine, checkpoints, reports."""
