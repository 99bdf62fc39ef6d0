"""The one exception class for users' mistakes."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what is wrong, where, and what to do.

    Programs print the sentence alone, without a traceback, and exit with code 2.
    """
