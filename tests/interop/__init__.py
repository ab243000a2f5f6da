"""Our files in the hands of the real libraries, and theirs in ours."""
