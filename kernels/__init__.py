"""Fused operations of the ELECTRA step, imported as fastelectra.kernels."""
