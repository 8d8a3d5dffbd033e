"""What travels between client and ranks: messages, and tensors in shared memory."""
