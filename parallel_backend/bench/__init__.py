"""Timing a transformer's step at a model's true shape with random weights, on real ranks or on rank 0 of any world."""
