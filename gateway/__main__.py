"""`python -m gateway`: a gateway configured by environment variables."""

import sys

from backbone.settings import GatewaySettings
from gateway.main import run

sys.exit(run(GatewaySettings()))
