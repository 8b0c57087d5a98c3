"""The `mfac` command."""
