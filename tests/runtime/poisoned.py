"""A library that asks CUDA about devices when it is imported, after which torch refuses to use them in forks."""

import torch

torch.cuda._is_in_bad_fork = lambda: True
