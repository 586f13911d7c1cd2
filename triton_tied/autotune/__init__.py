"""Which config serves which problem, and the tuning that finds out.

Imports ``kernels`` and the plain modules below it. Open :mod:`.select` first.
"""
