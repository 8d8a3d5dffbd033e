"""The recipe of the demo model: scenes, captions, VAE, transformer, and the checker that measures the result."""
