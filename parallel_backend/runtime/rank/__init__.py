"""What runs in a rank of a worker group."""
