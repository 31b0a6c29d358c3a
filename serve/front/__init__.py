"""What stands before every engine: keys, limits, checks, one shape of errors, and an orderly end."""
