"""The two ways in which a run ends early. The message is the one line that the user sees."""


class UserError(Exception):
    """What the user wrote cannot be done. Exit status 2."""


class RunError(Exception):
    """Something failed while running. Exit status 1."""
