"""The one error that is the user's to mend."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, said in one line together with its remedy.

    The command line prints the line and exits with status 2; `--debug` shows the traceback.
    """


def unknown(kind: str, word: str, known: Iterable[str]) -> UserError:
    """The error for a `word` that is none of the `known` ones: it names the nearest, or all where none is near."""
    import difflib

    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}"
    return UserError(f"unknown {kind} {word}: {remedy}")
