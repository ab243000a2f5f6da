"""What carries a trainer's tensors into the arena, and keeps them still while that lasts."""
