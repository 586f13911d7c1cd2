"""What the compiler makes of the kernels, for GPUs that need not be there; and the committed list.

Imports ``autotune``, ``kernels`` and the plain modules below them. Open :mod:`.report` first.
"""
