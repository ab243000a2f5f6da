"""In the trainer: a thread with an event loop of its own, the saves in flight, the worker and its supervision."""
