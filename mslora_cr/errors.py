"""The one base of errors that a user can mend."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and how to mend it."""
