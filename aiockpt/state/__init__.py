"""What is in the user's state, by name: tensors, values, and how both go back; the layer that knows torch's objects."""
