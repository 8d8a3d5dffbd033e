"""FLUX.2 (Black Forest Labs)."""
