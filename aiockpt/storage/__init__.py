"""Files: direct I/O, locks, the run directory, the commit, reading back; synchronous, callers bring threads."""
