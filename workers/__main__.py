"""`python -m workers`: run a worker that environment variables configure."""

import sys

from backbone.lean_imports import lean_imports

with lean_imports():
    from workers.main import main

sys.exit(main())
