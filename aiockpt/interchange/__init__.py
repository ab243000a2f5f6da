"""Checkpoints and the files of other programs: what is written for them, what is read from them."""
