"""The `diffjax` command: reads the arguments, hands over to the module that does the work, says errors in one line."""

import argparse
import contextlib
import errno
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from diffjax.models import options
from diffjax.models.options import Asked, Method, Request, one_of
from diffjax.utils import interrupt
from diffjax.utils.errors import UserError, unknown
from diffjax.utils.progress import counted

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 (the answer is no, or a bug), 2 (the user's to mend), 128 + a
    signal's number.

    Errors are one line on stderr; with `--debug` the traceback comes before it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _one_line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding
    try:
        with interrupt.command():
            args = parse(argv)
            status = args.run(args) or 0
            sys.stdout.flush()
            if several := _hosts():
                several.leave()
            return status
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _end(error)


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

        args.config, rest = parse_config(args.config, rest, lambda: options.defaults(Request))
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
    """The parser of `diffjax`, and those of its commands: a command's docstring is its description and examples."""
    parser = _Parser(prog="diffjax", description="Diffusion models in JAX.", epilog=_EXAMPLES)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (command, help) in COMMANDS.items():
        description, examples, text = inspect.cleandoc(command.__doc__ or "").partition("examples:\n")
        added = subparsers.add_parser(name, help=help, description=description.strip(), epilog=examples + text)
        added.set_defaults(run=command(added))
    for command in (parser, *subparsers.choices.values()):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, subparsers.choices


_EXAMPLES = """examples:
  diffjax doctor                                   what jax finds on this machine, and what is wrong with it
  diffjax init my_project                          the experiments that come with diffjax, to be changed
  diffjax config --config experiments/emoji.py     every field of an experiment, with its meaning
  diffjax train --config experiments/emoji.py --workdir runs/emoji
  diffjax sample --run runs/emoji --prompt "a red heart" --out pictures
  diffjax words --run runs/emoji                   what words its prompts can have
  diffjax COMMAND --help                           what a command takes, with examples
"""

Run = Callable[[argparse.Namespace], int | None]


def _doctor(parser: _Parser) -> Run:
    """Print versions, devices, driver, caches and free disk, then each problem with the command that
    mends it.

    examples:
      diffjax doctor
      diffjax doctor --require gpu && diffjax train ...
    """
    parser.add_argument(
        "--require", type=one_of("device", "gpu", "tpu"), metavar="gpu|tpu", help="exit with 1 unless jax uses one"
    )
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")

    def run(args: argparse.Namespace) -> int:
        from diffjax.doctor import main

        return main(require=args.require, as_json=args.json)

    return run


def _init(parser: _Parser) -> Run:
    """Write experiments/*.py, and a .gitignore for what they make, into a folder. Nothing that is there is changed.

    examples:
      diffjax init my_project && cd my_project
    """
    parser.add_argument("folder", metavar="DIR", help="the folder, made if it is not there")

    def run(args: argparse.Namespace) -> None:
        from diffjax import project

        print(project.create(args.folder))

    return run


def _config(parser: _Parser) -> Run:
    """Print the whole config, a field a line: its value, what it means and what it can be. A * marks what
    differs from the default.

    examples:
      diffjax config --config experiments/emoji.py
      diffjax config --config experiments/emoji.py --config.optimizer.name=adamw
      diffjax config --run runs/emoji
    """
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="an experiment; any field can be overridden: --config.a.b=value")
    _add_run(what)

    def run(args: argparse.Namespace) -> None:
        from diffjax.config import listing, read

        for line in listing.lines(args.config or read(args.workdir), Request):
            print(line)

    return run


def _prepare(parser: _Parser) -> Run:
    r"""Do once what training would do before its first step, and what it never does: fetch the pictures that a
    table has on the web. All goes to the cache folder; interrupted, the same command goes on.

    examples:
      diffjax prepare --config experiments/minimagen/base64.py --config.data.path=PICTURES
      diffjax prepare --config experiments/minimagen/base64.py \
        --config.data.name=captioned_table --config.data.path=links.parquet
      diffjax prepare --config experiments/minimagen/base64.py \
        --config.data.name=webdataset --config.data.path=SHARDS --beam

    Any field of the config can be overridden: --config.a.b=value, --noconfig.flag.
    """
    _add_config(parser)
    parser.add_argument("--retry", action="store_true", help="try once more to fetch the pictures that failed before")
    parser.add_argument(
        "--beam",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="prepare the pictures by Apache Beam, on all cores here or as these pipeline options say",
    )

    def run(args: argparse.Namespace) -> None:
        if "data" not in args.config:
            raise UserError("this experiment reads no data: there is nothing to prepare")
        from diffjax.parallel import devices, hosts
        from diffjax.train.ready import make_ready

        devices.join_hosts()
        devices.find()
        found = make_ready(args.config, args.retry, args.beam)
        hosts.say(f"ready: {counted(len(found), 'picture')} of {found.size} pixels")

    return run


def _train(parser: _Parser) -> Run:
    r"""Train, or go on where an interrupted run of the same command stopped.

    examples:
      diffjax train --config experiments/emoji.py --workdir runs/emoji
      diffjax train --config experiments/emoji.py --workdir runs/short --config.train.steps=100
      diffjax train --config experiments/emoji.py --workdir runs/emoji \
        --config.optimizer.learning_rate=1e-4 --allow-change
      diffjax train --config experiments/emoji.py --workdir runs/second --init-from runs/emoji

    Any field of the config can be overridden: --config.a.b=value, --noconfig.flag.
    """
    _add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints, metrics and samples go")
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="go on with another config or other data; changes.json says what has changed",
    )
    parser.add_argument("--init-from", metavar="DIR", help="begin with the weights of another run, as far as they fit")
    parser.add_argument("--init-step", type=int, metavar="N", help="those of this checkpoint (default: the newest)")
    parser.add_argument(
        "--init-weights",
        type=one_of("weights", "ema", "raw"),
        metavar="ema|raw",
        help="the averaged ones (default) or the raw ones",
    )

    def run(args: argparse.Namespace) -> None:
        from diffjax.parallel import devices

        devices.start()
        from diffjax.train.loop import train

        train(_with_init(args), args.workdir, args.allow_change)

    return run


def _with_init(args: argparse.Namespace) -> "ConfigDict":
    """The config with what it begins from. Raises `UserError` for a step or weights of no run."""
    from ml_collections import ConfigDict

    if not args.init_from:
        if args.init_step is not None or args.init_weights:
            raise UserError("--init-step and --init-weights are of the run that --init-from names: give it too")
        return args.config
    with args.config.unlocked():
        args.config.init_from = ConfigDict(
            {"run": args.init_from, "step": args.init_step or 0, "weights": args.init_weights or "ema"}
        )
    return args.config


def _sample(parser: _Parser) -> Run:
    r"""Draw pictures into a folder: each as soon as it is done, then a sheet of all and a manifest.
    The same command goes on where it was stopped, and draws no picture twice.

    examples:
      diffjax sample --run runs/emoji --prompt "red heart" --prompt pizza --num 8 --out pictures
      diffjax sample --model google/ddpm-cat-256 --quality good --num 4 --out cats
      diffjax sample --config experiments/ddpm_cat256.py --config.num=4 --out cats
      diffjax sample --model stabilityai/stable-diffusion-3.5-large --prompt "a lighthouse" --size 1344x768 \
        --out pictures
      diffjax sample --run runs/emoji --prompt pizza --guidance 4 \
        --guide apg momentum=-0.5 low=0.2 rescale=0.7 --out pictures
      diffjax sample --cascade runs/base64 runs/super256 --prompt "a lighthouse" --out pictures
      diffjax sample --replay pictures/manifest.json --out again
    """
    model = _add_model(parser, "a hub id, a folder in the layout of diffusers, or a single file of SD3.5")
    model.add_argument(
        "--cascade", nargs="+", metavar="DIR", help="the runs of a cascade, super-resolution stages last"
    )
    model.add_argument(
        "--config", metavar="FILE", help="a sampling experiment; fields are overridden by --config.NAME=value"
    )
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="the manifest.json of an earlier job: the same again (with --run or --model: moved there)",
    )
    options.add_flags(parser, Request, options.added(Request, Asked))
    parser.add_argument("--prompt-file", metavar="FILE", help="more prompts, one on a line")
    num = {"help": "pictures of each prompt or label (default 4)"}
    options.add_flags(parser, Asked, options.added(Asked, Method), num=num)
    parser.add_argument(
        "--quality",
        type=one_of("quality", "draft", "good", "reference"),
        metavar="NAME",
        help="draft: 10 steps of the best solver, good: 25, reference: 1000 ancestral ones; "
        "what is given beside it wins",
    )
    options.add_flags(parser, Method)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what is in DIR")
    parser.add_argument(
        "--preview", type=int, metavar="N", help="show pictures under way every N steps; 0 never (default: every 3 s)"
    )
    return lambda args: _draw(args, parser)


def _draw(args: argparse.Namespace, parser: _Parser) -> int | None:
    from diffjax.loading import run_folder
    from diffjax.parallel import devices
    from diffjax.sampling import job

    if not any((args.replay, args.workdir, args.model, args.cascade, args.config)):
        parser.error("one of the arguments --run --model --cascade --config --replay is required")
    if args.replay:
        _refuse_beside("--replay", "from the manifest", args, parser, "workdir", "model")
        moved = run_folder(args.workdir) if args.workdir else args.model
        devices.start()
        return not job.replay(args.replay, args.out, moved, preview=args.preview, overwrite=args.overwrite)
    if args.cascade:
        from diffjax.sampling import cascade

        devices.start()
        return cascade.draw(args)
    request = job.requested(args)
    devices.start()
    job.generate(job.preset(request), args.out, preview=args.preview, overwrite=args.overwrite)


def _refuse_beside(flag: str, whence: str, args: argparse.Namespace, parser: _Parser, *but: str) -> None:
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if given := given - {"command", "debug", flag.lstrip("-"), "out", "preview", "overwrite", *but}:
        raise UserError(f"{flag} takes {', '.join(sorted(given))} {whence}: leave them out")


def _explain(parser: _Parser) -> Run:
    """Draw a picture once more and write one page about it: from noise to the picture with the numbers of
    every step, what each word and guidance did, where it comes from, what it cost, how the run was trained.
    The page needs nothing beside it; its pictures are in DIR/pictures, its numbers in DIR/numbers.json.

    examples:
      diffjax explain --run runs/emoji --prompt "red heart" --seed 0 --out page
      diffjax explain --model google/ddpm-cat-256 --steps 25 --sampler dpmpp_2m --out page
      diffjax explain --config experiments/ddpm_cat256.py --out page
    """
    model = _add_model(parser, required=True)
    model.add_argument("--config", metavar="FILE", help="a sampling experiment; --config.NAME=value overrides a field")
    prompts, labels = {"help": "what is drawn"}, {"metavar": "CLASS"}
    seed = {"help": "which noise: picture 0 of `diffjax sample` (default 0)"}
    options.add_flags(parser, Request, (*FORM, "dtype", "prompts", "negative_prompt"), prompts=prompts)
    options.add_flags(parser, Request, ("labels", "size", "seed"), labels=labels, seed=seed)
    options.add_flags(parser, Method)
    parser.add_argument("--out", required=True, metavar="DIR", help="where index.html goes")
    parser.add_argument(
        "--patience",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="figures that would take longer are put off, and the page says so (default 120)",
    )

    def run(args: argparse.Namespace) -> None:
        from diffjax import explain
        from diffjax.parallel import devices

        request = explain.requested(args)
        devices.start()
        print(f"open {explain.write(request, args.out, args.patience)} in a browser")

    return run


def _words(parser: _Parser) -> Run:
    """List the words of the captions that a run was trained on, the most frequent first. A run that reads
    its prompts with such words (`text.name` words) knows no others.

    examples:
      diffjax words --run runs/emoji
      diffjax words --run runs/emoji | grep heart
    """
    _add_run(parser, required=True)

    def run(args: argparse.Namespace) -> None:
        from diffjax.text import reading
        from diffjax.train import experiment

        print(reading.listing(experiment.words(args.workdir)))

    return run


def _evaluate(parser: _Parser) -> Run:
    """Draw training prompts and compare with the training pictures: retrieval top-1, PSNR and, where the data
    have classes, whether the class is right; the same of the prompts of config.data.held_out, which no training
    picture has. Of a super-resolution stage: PSNR on those pictures, against bicubic interpolation. It draws as
    the run's config says, but for what is given. The result goes to evaluation.json, evaluation.png and
    held_out.png in the run's folder.

    examples:
      diffjax evaluate --run runs/emoji
      diffjax evaluate --run runs/emoji --num 16 --guidance 3
    """
    _add_run(parser, required=True)
    parser.add_argument("--num", type=int, default=64, metavar="N", help="prompts or pictures (default 64)")
    options.add_flags(parser, Method)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which prompts, and the noise (default 0)")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")

    def run(args: argparse.Namespace) -> None:
        from diffjax.evaluate import runs
        from diffjax.loading import run_folder
        from diffjax.parallel import devices

        workdir = run_folder(args.workdir)
        devices.start()
        runs.measure(workdir, args.num, seed=args.seed, step=args.step, **options.given(Method, args))

    return run


def _plan(parser: _Parser) -> Run:
    """Print parameters, bytes, peak memory, floating-point operations and the predicted time of drawing
    with a model, or of training an experiment and drawing with it. Nothing is computed and no weights are
    read; the first call measures this machine's speed for a few seconds.

    examples:
      diffjax plan --model google/ddpm-cat-256 --steps 25 --num 4
      diffjax plan --model stabilityai/stable-diffusion-3.5-large --size 1024 --steps 28 --device h100
      diffjax plan --model stabilityai/stable-diffusion-3.5-large --device v5e-8 --shard tensor --compile
      diffjax plan --run runs/emoji --sampler heun
      diffjax plan --config experiments/emoji64.py --device h100 --config.train.batch=512
    """
    what = _add_model(parser, required=True)
    what.add_argument("--config", metavar="FILE", help="an experiment; any field can be overridden: --config.a.b=value")
    options.add_flags(parser, Request, FORM)
    dtype = {"type": str, "help": "float32 or bfloat16 (default: float32, of latent models bfloat16)"}
    options.add_flags(parser, Asked, num={"help": "pictures in all (default 1)"}, dtype=dtype)
    parser.add_argument(
        "--device",
        metavar="NAME[-N]",
        help="h100, h200, a100, t4, v4, v5e, v5p, v6e or cpu, and how many, as v5e-8; default: the one found here",
    )
    options.add_flags(parser, Request, ("shard",), shard={"help": "how several devices share the parameters"})
    help = "compile for that device, for its exact memory; an accelerator's compiler is enough, it need not be here"
    parser.add_argument("--compile", action="store_true", help=help)

    def run(args: argparse.Namespace) -> None:
        from diffjax import plan
        from diffjax.loading import run_folder
        from diffjax.parallel import devices

        devices.find()
        asked, target = Asked(**options.given(Asked, args)), plan.Target.parse(args.device, args.shard)
        if args.compile:
            target.devices()
        if args.model:
            jobs = plan.model(args.model, asked, args.revision or None, args.variant, args.shard)
        elif args.revision or args.variant:
            raise UserError("--revision and --variant are of --model: leave them out")
        elif args.config:
            jobs = plan.config(_for_device(args.config, target.kind), asked, args.shard)
        else:
            jobs = plan.of_run(run_folder(args.workdir), asked, args.shard)
        print("\n\n".join(plan.table(job, target, args.compile) for job in jobs))

    return run


def _for_device(config: Any, device: str | None) -> Any:
    """The config as an accelerator that is not here would train it: a dtype "auto" is bfloat16 there."""
    from diffjax.config import decided

    return decided(config, lambda _: "bfloat16") if device not in (None, "cpu") else config


def _fit_grid(parser: _Parser) -> Run:
    """Search the time grid with which a solver of few steps ends nearest to its own fine solution, by
    gradient descent through the sampler; print its error on other seeds beside that of the named grids, and
    keep it with the model, where `--grid fitted` finds it. Each iteration costs about four drawings of all
    seeds.

    examples:
      diffjax fit-grid --model google/ddpm-cifar10-32 --steps 10
      diffjax fit-grid --run runs/emoji --steps 8 --sampler dpmpp_2m --prompt pizza --prompt rocket
    """
    _add_model(parser, required=True)
    options.add_flags(parser, Request, FORM)
    steps = {"required": True, "help": "steps of the grid"}
    sampler = {"default": "unipc", "help": "a sampler without noise (default unipc)"}
    options.add_flags(parser, Method, ("steps", "sampler", "guidance", "guide"), steps=steps, sampler=sampler)
    prompts = {"default": [], "help": "can be repeated: the images take turns"}
    options.add_flags(parser, Request, ("prompts",), prompts=prompts)
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="images to fit to (default 8)")
    parser.add_argument("--iterations", type=int, default=60, metavar="N", help="of the descent (default 60)")

    def run(args: argparse.Namespace) -> None:
        from diffjax import fit_grid
        from diffjax.loading import load, run_folder
        from diffjax.models import fitted
        from diffjax.parallel import devices

        name = run_folder(args.workdir) if args.workdir else args.model
        devices.start()
        model = load(name, revision=args.revision or None, variant=args.variant)
        how = {"prompt": args.prompts, "seeds": args.seeds, "iterations": args.iterations}
        found = fit_grid.fit(model, Method(**options.given(Method, args)), shown=fit_grid.progress, **how)
        print(fit_grid.report(found))
        print(f"kept in {fit_grid.keep(model.name, args.sampler, found)}: sample with")
        print(f"  --steps {args.steps} --sampler {args.sampler} --grid fitted{fitted.flags(found.to)}")

    return run


def _convert(parser: _Parser) -> Run:
    """Write a U-Net that was trained on a discrete process as a folder that
    diffusers.DDPMPipeline.from_pretrained loads and samples to the same numbers, the transformer or the
    adapters of a fine-tuned Stable Diffusion 3 as diffusers reads them, or the parameters of any model as an
    Orbax checkpoint.

    examples:
      diffjax convert runs/ddpm ddpm
      diffjax convert google/ddpm-cat-256 cat.orbax --to orbax
    """
    parser.add_argument("model", metavar="MODEL", help="a run's folder, one in the layout of diffusers, or a hub id")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    options.add_flags(parser, Request, FORM)
    parser.add_argument(
        "--to", type=one_of("format", "diffusers", "orbax"), default="diffusers", help="diffusers or orbax"
    )

    def run(args: argparse.Namespace) -> None:
        from diffjax.convert import convert_model
        from diffjax.parallel import devices

        devices.find()
        convert_model(args.model, args.out, args.to, args.revision or None, args.variant)
        print(f"{args.out} is written")

    return run


COMMANDS = {
    "doctor": (_doctor, "say what jax finds on this machine, and how to mend what is wrong"),
    "init": (_init, "write the experiments that come with diffjax into a folder, to be changed"),
    "config": (_config, "print every field of an experiment or a run, with its meaning"),
    "prepare": (_prepare, "make an experiment's data ready: fetch, shrink, encode the captions"),
    "train": (_train, "train the experiment of a config file"),
    "sample": (_sample, "draw pictures with a trained or a published model"),
    "explain": (_explain, "write a page that shows how a picture was made, step by step"),
    "words": (_words, "list the words that a run can read, with how often its captions have them"),
    "evaluate": (
        _evaluate,
        "measure how well a run draws its training prompts, or a super-resolution stage held-out pictures",
    ),
    "plan": (_plan, "say what a job will cost before it runs: memory, operations, time"),
    "fit-grid": (_fit_grid, "fit the times of a few-step solver to a model"),
    "convert": (_convert, "write a model for other programs: diffusers, or Orbax"),
}
"""Every command: a function that adds its flags to a parser and returns what runs it, and what it does in a line."""

FORM = ("revision", "variant")
"""Which of the forms in which a model is published."""


def _add_config(parser: _Parser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config()")


def _add_run(parser: Any, required: bool = False) -> None:
    parser.add_argument("--run", dest="workdir", required=required, metavar="DIR", help="the --workdir of a training")


def _add_model(
    parser: _Parser, kinds: str = "a hub id, or a folder in the layout of diffusers", required: bool = False
) -> Any:
    """The flags of a run and of a published model, in a group of which one is given."""
    group = parser.add_mutually_exclusive_group(required=required)
    _add_run(group)
    group.add_argument("--model", metavar="ID", help=kinds)
    return group


def _one_line(message: Warning | str, *place: object) -> str:
    return f"diffjax: {message}\n"


def _hosts() -> Any:
    """`parallel.hosts` where this process is one of several, else None."""
    module = sys.modules.get("diffjax.parallel.hosts")
    return module if module and module.count() > 1 else None


def _end(error: BaseException) -> int:
    """The exit status of an error, which is said; one of several hosts ends here, since the others wait for it."""
    several = _hosts()
    if several and not isinstance(error, (UserError, KeyboardInterrupt)):
        several.blame()
    status = _report(error)
    if several:
        several.leave(failed=True)
        os._exit(status)
    return status


def _report(error: BaseException) -> int:
    status, line = _said(error)
    if isinstance(error, BrokenPipeError):  # nobody reads stdout any more: let the interpreter's last flush succeed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"diffjax: {line}", file=sys.stderr)
    return status


def _said(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, interrupt.Terminated):
        return 128 + error.number, "terminated; the same command goes on from what is saved"
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
