"""What is launched, and how: programs, functions in fresh interpreters, and the guardian that starts them."""
