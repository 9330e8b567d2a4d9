"""`python -m workers`: a worker configured by environment variables."""

import sys

from workers.main import main

sys.exit(main())
