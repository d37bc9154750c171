"""The `diffjax` command: reads the arguments, hands over to the module that does the work, says errors in one line."""

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from diffjax.errors import UserError, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 (the answer is no, or a bug), 2 (the user's to mend), 130 (Ctrl-C).

    Errors are one line on stderr; with `--debug` the traceback comes before it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _report(error)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `--config` of a command that has one becomes the config, its overrides applied.

    Raises `UserError` for anything unknown or missing.
    """
    parser, commands = _parsers()
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    command = next((word for word in argv if not word.startswith("-")), None)
    if command and command not in commands:
        raise unknown("command", command, commands)
    args, rest = parser.parse_known_args(argv)
    if getattr(args, "config", None):
        from diffjax.config import parse as parse_config

        args.config, rest = parse_config(args.config, rest)
    if rest:
        word, usage = rest[0].partition("=")[0], commands[args.command].format_help()
        if not word.startswith("-"):
            raise UserError(f"unexpected argument {word} (see `diffjax {args.command} --help`)")
        raise unknown("flag", word, dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*", usage)))
    return args


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="diffjax", description="Diffusion models in JAX.", epilog=_EXAMPLES)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_doctor, _train):
        add(subparsers)
    for command in (parser, *subparsers.choices.values()):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, subparsers.choices


_EXAMPLES = """examples:
  diffjax doctor                                   what jax finds on this machine, and what is wrong with it
  diffjax train --config experiments/emoji.py --workdir runs/emoji
  diffjax COMMAND --help                           what a command takes, with examples
"""


def one_of(kind: str, *names: str) -> Callable[[str], str]:
    """An argparse type: one of the names; the error for another one names the nearest."""

    def convert(word: str) -> str:
        if word not in names:
            raise argparse.ArgumentTypeError(str(unknown(kind, word, names)))
        return word

    return convert


def _doctor(subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what jax finds on this machine, and how to mend what is wrong",
        description="Print versions, devices, driver, caches and free disk, then each problem with the command that\n"
        "mends it.",
        epilog="examples:\n  diffjax doctor\n  diffjax doctor --require gpu && diffjax train ...\n",
    )
    parser.add_argument(
        "--require", type=one_of("device", "gpu", "tpu"), metavar="gpu|tpu", help="exit with 1 unless jax uses one"
    )
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")

    def run(args) -> int:
        from diffjax.doctor import main

        return main(require=args.require, as_json=args.json)

    parser.set_defaults(run=run)


def _train(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train the experiment of a config file",
        description="Train, or go on where an interrupted run of the same command stopped.",
        epilog="examples:\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/emoji\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/short --config.train.steps=100\n\n"
        "Any field of the config can be overridden: --config.a.b=value, --noconfig.flag.\n",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints, metrics and samples go")

    def run(args) -> None:
        from diffjax import mesh

        mesh.start()
        from diffjax.train.loop import train

        train(args.config, args.workdir)

    parser.set_defaults(run=run)


def _report(error: BaseException) -> int:
    status, line = _explain(error)
    if isinstance(error, BrokenPipeError):  # nobody reads stdout any more: let the interpreter's last flush succeed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        print(f"diffjax: {line}", file=sys.stderr)
    return status


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command goes on from what is saved"
    if isinstance(error, BrokenPipeError):
        return 0, "nobody reads the output"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 2, f"the disk is full{_where(error)}: free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return 2, f"{error.strerror}{_where(error)}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return 2, "out of memory: use a smaller batch or picture, or a device with more memory (`diffjax doctor`)"
    text = " ".join(str(error).split())[:300]
    return 1, f"this looks like a bug: {type(error).__name__}: {text} (--debug shows where)"


def _where(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""
