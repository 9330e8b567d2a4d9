"""`python -m gateway`: a gateway configured by environment variables."""

import sys

import backbone  # noqa: F401 - before others import structlog
from gateway.server import main

sys.exit(main())
