"""The kernels as PyTorch operators, with every derivative, and the way to them.

Imports ``autotune``, ``kernels`` and the plain modules below them. Open :mod:`.kernel_path` first.
"""
