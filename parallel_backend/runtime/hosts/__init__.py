"""What runs on a host beside the ranks: torchrun, the fork server, and what hosts of one group tell each other."""
