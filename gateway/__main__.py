"""`python -m gateway`: a gateway configured by environment variables."""

import sys

from gateway.server import main

sys.exit(main())
