"""Errors that people read: one or two lines, no traceback."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """The user's input is wrong: exit status 2. The message names file, key and what to do."""


class RecipeError(UserError):
    """Mistakes in a recipe, one argument each, all of which begin with a key of the recipe.

    Who knows the file puts its name in front of each.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class RunError(Exception):
    """Something failed that is not the user's doing: exit status 1. Finished work is kept."""


# Errors of a shared file system that may not come again.
_PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN}
    | {errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}
)


def passes_by(error: BaseException) -> bool:
    """Whether the same may go well a moment later."""
    return isinstance(error, OSError) and error.errno in _PASSING


_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def denied(error: BaseException) -> UserError | None:
    """What is told where this user may not read or write a file; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in _DENIED or error.filename is None:
        return None
    return UserError(
        f"{error.filename}: {error.strerror} (for user {os.geteuid()}): change its rights, or those"
        " of the folders above, or name another place"
    )


@contextmanager
def denials() -> Iterator[None]:
    """Raises what :func:`denied` tells; a decorator as well."""
    try:
        yield
    except OSError as error:
        told = denied(error)
        if told is None:
            raise
        raise told from error


class Mistakes:
    """Collects the mistakes of a recipe, so that all are told at once.

    Attributes:
        found: one text each, beginning with a key.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, work: Callable[[], T], key: str = "") -> T | None:
        """``work()``, or None where it found a mistake.

        Args:
            key: put in front of what is no :class:`RecipeError`; without it, only those are kept.
        """
        try:
            return work()
        except RecipeError as error:
            self.found += map(str, error.args)
        except UserError as error:
            if not key:
                raise
            self.found.append(f"{key}: {error}")
        return None

    def error(self) -> RecipeError:
        """All of them, each once."""
        return RecipeError(*dict.fromkeys(self.found))
