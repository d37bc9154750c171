"""Experiments' configs: a Python file with `get_config()`, the fields that it leaves out, and what the command line
overrides.

    fields      what a base is made of: fields and tables, each with its meaning
    meanings    what the arguments mean of all that a config can name
    base        every field with its default, what it can be, and what it means
    kinds       the bases of several kinds of experiment, which say of these fields what experiments have in common
    completion  a config with the fields that it leaves out, each value checked
    overrides   `--config.key=value`
    reading     configs of experiments, in Python files, and of runs
    listing     a whole config in lines, each with its meaning
"""

from ml_collections import ConfigDict

from diffjax.config.completion import complete, decided
from diffjax.config.overrides import parse
from diffjax.config.reading import EXPERIMENTS, experiments, found, load, read, settle

__all__ = [
    "EXPERIMENTS",
    "ConfigDict",
    "complete",
    "decided",
    "experiments",
    "found",
    "load",
    "parse",
    "read",
    "settle",
]
