"""VAEs, which several families share."""
