"""This package against everything that a user would otherwise run, in one process.

Imports ``operators``, ``autotune`` and the layers' files. Open :mod:`.suite` first.
"""
