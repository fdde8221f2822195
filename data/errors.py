"""The one exception for what a user can mend. Commands print its message without a traceback."""


class UserError(Exception):
    """Something the user can put right. The message says what happened, where, and what to do."""


class DataError(UserError):
    """A data set that cannot be read as declared: a missing file, a wrong column, a bad row."""
