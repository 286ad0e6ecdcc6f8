"""The exception for errors that a user can fix: one sentence that names the thing and says what to do."""


class UserError(Exception):
    """Bad input. Scripts print the message to stderr, without a traceback, and exit with status 2 (`cli.run`)."""
