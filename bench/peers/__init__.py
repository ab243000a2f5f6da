"""The peers, one small file each, in their best documented configuration."""
