"""Triton code, how it may cut a problem into tiles, and the one way to launch it.

Imports the plain modules only. Open ``conv`` for the kernel and :mod:`.launch` for its launch.
"""
