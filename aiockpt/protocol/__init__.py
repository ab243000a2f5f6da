"""The wire between trainer and worker, sans-IO: bytes in, messages out, and the life of a save as one table."""
