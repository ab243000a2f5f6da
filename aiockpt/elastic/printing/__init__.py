"""What the children print: where it goes, and how it gets there without stopping anybody."""
