"""Errors that people read: one or two lines, no traceback."""


class UserError(Exception):
    """The user's input is wrong: exit status 2. The message names file, key and what to do."""


class RecipeError(UserError):
    """The message begins with a key of the recipe; who knows the file puts its name in front."""


class RunError(Exception):
    """Something failed that is not the user's doing: exit status 1. Finished work is kept."""
