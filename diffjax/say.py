"""Words for numbers."""


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`; a noun takes -s, -es after s, x, ch and sh."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number} {noun}{ending}"
