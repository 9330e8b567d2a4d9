"""`python -m gateway`: a gateway configured by environment variables."""

import sys

from gateway.main import main

sys.exit(main())
