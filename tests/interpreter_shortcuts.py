"""Triton's interpreter without most of what takes its time, which changes no result."""

from types import SimpleNamespace

from triton.runtime import interpreter


def take(patch):
    """``patch``: a MonkeyPatch.

    - ``triton.language`` is replaced once in a launch, not again for each call of a function.
    - Sums and products of int32 are not made again in int64, to see that they do not overflow. Only
      tests/kernels/wide.py has numbers that large; it runs in processes of its own, and checks.
    """
    patch.setattr(interpreter, "_patch_lang", _patch_all(interpreter._patch_lang))
    patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)


def _patch_all(patch_lang):
    """What kernels see of the language, and what the functions of the language itself see."""
    own = SimpleNamespace(__globals__={"core": interpreter.tl.core})

    def patch_both(kernel):
        scopes = [patch_lang(own), patch_lang(kernel)]
        return SimpleNamespace(restore=lambda: [scope.restore() for scope in reversed(scopes)])

    return patch_both


def _call(self, *arguments, **named):
    return self.rewrite()(*arguments, **named)
