"""Triton code and nothing else; see :mod:`triton_tied.launch` for how it is launched."""
