"""Triton's interpreter without its waste: the same results in half the time."""

from __future__ import annotations

import functools
import importlib.util


def without_waste() -> None:
    """Patches Triton's interpreter, where Triton is installed.

    A launch replaces the functions of `triton.language` by interpreted ones. Triton 3.6 looks through all of them again
    at each call of a device function, dozens of times a launch, and finds nothing left to replace. It also makes the
    table of numpy's types at each look-up, and the type of a shape with each tensor.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    patch, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype

    def patch_once(function):
        modules = [m for m in (language, language.core) if any(m is value for value in function.__globals__.values())]
        # Where a module's function is still Triton's own, nothing of it has been replaced yet.
        own = any(language.core.is_builtin(module.load) for module in modules)
        return patch(function) if own or not modules else interpreter._LangPatchScope()

    of_values = language.core._type_for_tuple_values
    of_integers = functools.cache(lambda *values: of_values(values))

    def type_of_tuple(values, fields=None):
        plain = fields is None and all(type(value) is int for value in values)
        return of_integers(*values) if plain else of_values(values, fields)

    language.core._type_for_tuple_values = type_of_tuple
    interpreter._patch_lang = patch_once
    of_elements = functools.cache(np_dtype)
    pointers = language.pointer_type
    interpreter._get_np_dtype = lambda t: np_dtype(t) if isinstance(t.scalar, pointers) else of_elements(t.scalar)
