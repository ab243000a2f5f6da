"""For tests of programs that use aiockpt: faults on order. Nothing in the library imports this."""
