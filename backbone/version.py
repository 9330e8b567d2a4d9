"""The version of this installation of Nexus."""

from importlib.metadata import PackageNotFoundError, version

from schemas.installation import DISTRIBUTION

try:
    VERSION = version(DISTRIBUTION)
except PackageNotFoundError:  # run from a bare source tree
    VERSION = "0+unknown"
