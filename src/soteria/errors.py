"""The one exception a user is meant to see: a sentence that names the thing and the mend."""


class UserError(Exception):
    """Bad input. Scripts print the message alone on stderr and exit with status 2 (`soteria.cli.main`)."""
