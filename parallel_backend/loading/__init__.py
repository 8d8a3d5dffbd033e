"""From files to rank-local weights: what a folder holds, and reading just the slices that a rank needs."""
