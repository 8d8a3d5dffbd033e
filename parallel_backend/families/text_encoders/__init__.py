"""Text encoders, which several families share."""
