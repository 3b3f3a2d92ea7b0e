"""Generator and discriminator over packed sequences."""

from fastelectra.model.electra import Electra

__all__ = ["Electra"]
