"""Compiled: loops over voxels as machine code, made by numba at their first call and kept beside the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """``function`` compiled for the types it is called with, without Python's lock, with numpy's arithmetic as written.

    Where the result can be stored neither beside the package nor in the user's cache, every process compiles anew.
    """
    try:
        made: F = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no place to store it in
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return made
