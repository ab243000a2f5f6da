"""The command line: ``aiockpt``."""
