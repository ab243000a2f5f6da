"""Which entry lies where, pure: a rank's local plan."""
