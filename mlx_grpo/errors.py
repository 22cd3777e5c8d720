"""The ways in which a run ends early. The message of the first two is the one line that the user sees."""


class UserError(Exception):
    """What the user wrote cannot be done. Exit status 2."""


class RunError(Exception):
    """Something failed while running. Exit status 1."""


class OutOfTime(BaseException):
    """A reward function took too long.

    No Exception, so that a function's own `except Exception` does not swallow it.
    """
