"""This package against everything a user would otherwise run, in one process."""
