"""`python -m workers`: run a worker that environment variables configure."""

import sys

from workers.main import main

sys.exit(main())
