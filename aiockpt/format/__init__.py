"""The bytes of a checkpoint, pure: safetensors images, the manifest, typed values, names in the run directory."""
