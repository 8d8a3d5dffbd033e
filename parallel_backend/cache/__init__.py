"""The block cache: which steps are computed in full, and what stands in for the blocks that are not."""
