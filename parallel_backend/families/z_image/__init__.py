"""Z-Image (Alibaba)."""
