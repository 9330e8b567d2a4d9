"""`python -m workers`: run a worker that environment variables configure."""

import sys

import backbone  # noqa: F401 - before others import structlog
from workers.main import main

sys.exit(main())
