"""`python -m gateway`: a gateway configured by environment variables."""

import sys

from backbone.lean_imports import lean_imports

with lean_imports():
    from gateway.server import main

sys.exit(main())
