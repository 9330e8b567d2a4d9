"""The version of this Nexus."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("nexus")
except PackageNotFoundError:  # run from a bare source tree
    VERSION = "0+unknown"
