"""``python -m parallel_backend``: the command line."""

import sys

from .cli import main

sys.exit(main())
