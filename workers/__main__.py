"""`python -m workers`: a worker configured by environment variables."""

import sys

from backbone.settings import WorkerSettings
from workers.main import run

sys.exit(run(WorkerSettings()))
