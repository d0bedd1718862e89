"""The one exception that means "the input is wrong", and how an absent extra is reported."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """A mistake in the input: the message names the thing, what was found, what was expected and the way out.

    The command line prints the message on one line and exits with code 2.
    """


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise a UserError that names the extra to install for `purpose`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'keelweight[{extra}]'"
        ) from error
