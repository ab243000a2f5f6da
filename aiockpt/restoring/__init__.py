"""The way back: choose a checkpoint, match it with the live state, read and verify its bytes, apply them."""
