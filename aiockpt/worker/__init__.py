"""The checkpoint worker: the trainer's child that writes what lies in the arena. Imports no torch, no numpy."""
