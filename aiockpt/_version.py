"""The version of the package, read by the build and by the handshake with the worker."""

__version__ = "0.1.0.dev0"
