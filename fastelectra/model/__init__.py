"""Generator and discriminator over packed sequences."""
