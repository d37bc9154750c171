"""Formulas, written as in the code's docstrings, as HTML: Greek letters, subscripts, powers and roots."""

import html as escape
import re

GREEK = {"alpha": "α", "sigma": "σ", "eps": "ε", "eta": "η", "sqrt": "√", "sum": "Σ"}
SUPERSCRIPT = re.compile(r"\^(\((?:[^()]|\([^()]*\))*\)|-?\w+)")
SUBSCRIPT = re.compile(r"_(?:\((\w+)\)|(\w+))")
LETTERS = re.compile(rf"(?<![A-Za-z])({'|'.join(GREEK)})(?![A-Za-z])")
MINUS = re.compile(r"(?<![\w])-(?=[\d.∞])| - ")


def html(text: str) -> str:
    """`x_s = alpha_s x0 + sigma_s r^eta eps` with α, σ, ε, η, and what follows `_` and `^` low and high."""
    text = escape.escape(text, quote=False)
    text = MINUS.sub(lambda found: found.group().replace("-", "−"), text)
    text = SUPERSCRIPT.sub(lambda found: f"<sup>{found.group(1).strip('()')}</sup>", text)
    text = SUBSCRIPT.sub(r"<sub>\1\2</sub>", text)
    text = LETTERS.sub(lambda found: GREEK[found.group(1)], text)
    return text.replace("x0", "x<sub>0</sub>")


def number(value: float) -> str:
    """A number of a formula: four digits, in brackets where it is negative."""
    shown = f"{value:.4g}"
    shown = shown.replace("inf", "∞")
    return f"({shown})" if shown.startswith("-") else shown
