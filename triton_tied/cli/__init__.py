"""``python -m triton_tied``: one file for each of its commands.

Imports everything else. Open :mod:`.main` first.
"""
