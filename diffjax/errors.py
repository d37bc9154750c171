"""The one error that is the user's to mend."""


class UserError(Exception):
    """A mistake in the input, said in one line together with its remedy.

    The command line prints the line and exits with status 2; `--debug` shows the traceback.
    """
