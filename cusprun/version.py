"""The version, as installed."""

from importlib import metadata

try:
    __version__ = metadata.version("cusprun")
except metadata.PackageNotFoundError:  # a checkout that is on the path but not installed
    __version__ = "0.0.0"
