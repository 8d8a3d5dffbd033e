"""What families' blocks are made of on a rank, and how an instance's forward is replaced."""
