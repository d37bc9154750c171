"""The `diffjax` command: reads the arguments, hands over to the module that does the work, says errors in one line."""

import argparse
import contextlib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
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
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding
    try:
        with interrupt.command():
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
    parser = _Parser(prog="diffjax", description="Diffusion models in JAX.", epilog=_EXAMPLES)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_doctor, _init, _prepare, _train, _sample, _explain, _words, _evaluate, _plan, _fit_grid, _convert):
        add(subparsers)
    for command in (parser, *subparsers.choices.values()):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, subparsers.choices


_EXAMPLES = """examples:
  diffjax doctor                                   what jax finds on this machine, and what is wrong with it
  diffjax init my_project                          the experiments that come with diffjax, to be changed
  diffjax train --config experiments/emoji.py --workdir runs/emoji
  diffjax sample --run runs/emoji --prompt "a red heart" --out pictures
  diffjax words --run runs/emoji                   what words its prompts can have
  diffjax COMMAND --help                           what a command takes, with examples
"""


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


def _init(subparsers) -> None:
    parser = subparsers.add_parser(
        "init",
        help="write the experiments that come with diffjax into a folder, to be changed",
        description="Write experiments/*.py, and a .gitignore for what they make, into a folder. Nothing that is there is changed.",
        epilog="examples:\n  diffjax init my_project && cd my_project\n",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder, made if it is not there")

    def run(args) -> None:
        from diffjax import project

        print(project.create(args.folder))

    parser.set_defaults(run=run)


def _prepare(subparsers) -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="make an experiment's data ready: fetch, shrink, encode the captions",
        description="Do once what training would do before its first step, and what it never does: fetch the pictures that a\n"
        "table has on the web. All goes to the cache folder; interrupted, the same command goes on.",
        epilog="examples:\n"
        "  diffjax prepare --config experiments/minimagen/base64.py --config.data.path=PICTURES\n"
        "  diffjax prepare --config experiments/minimagen/base64.py \\\n"
        "    --config.data.name=captioned_table --config.data.path=links.parquet\n\n"
        "Any field of the config can be overridden: --config.a.b=value, --noconfig.flag.\n",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config()")
    parser.add_argument("--retry", action="store_true", help="try once more to fetch the pictures that failed before")

    def run(args) -> None:
        if "data" not in args.config:
            raise UserError("this experiment reads no data: there is nothing to prepare")
        from diffjax import data
        from diffjax.parallel import devices
        from diffjax.text import frozen
        from diffjax.train import experiment

        experiment.check_conditions(args.config)
        data.fetch(args.config.data, args.retry)
        found = data.load(args.config.data)
        if frozen.is_frozen(args.config.get("text")):
            devices.find()
            frozen.encoded(args.config.text, frozen.captions(found, args.config.sample.prompts))
        print(f"ready: {counted(len(found), 'picture')} of {found.size} pixels")

    parser.set_defaults(run=run)


def _train(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train the experiment of a config file",
        description="Train, or go on where an interrupted run of the same command stopped.",
        epilog="examples:\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/emoji\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/short --config.train.steps=100\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/emoji --config.optimizer.learning_rate=1e-4 --allow-change\n"
        "  diffjax train --config experiments/emoji.py --workdir runs/second --init-from runs/emoji\n\n"
        "Any field of the config can be overridden: --config.a.b=value, --noconfig.flag.\n",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config()")
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

    def run(args) -> None:
        from diffjax.parallel import devices

        devices.start()
        from diffjax.train.loop import train

        train(_with_init(args), args.workdir, args.allow_change)

    parser.set_defaults(run=run)


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


def _sample(subparsers) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="draw pictures with a trained or a published model",
        description="Draw pictures into a folder: each as soon as it is done, then a sheet of all and a manifest.\n"
        "The same command goes on where it was stopped, and draws no picture twice.",
        epilog="examples:\n"
        '  diffjax sample --run runs/emoji --prompt "red heart" --prompt pizza --num 8 --out pictures\n'
        "  diffjax sample --model google/ddpm-cat-256 --quality good --num 4 --out cats\n"
        "  diffjax sample --config experiments/ddpm_cat256.py --config.num=4 --out cats\n"
        '  diffjax sample --model stabilityai/stable-diffusion-3.5-large --prompt "a lighthouse" --size 1344x768 --out pictures\n'
        "  diffjax sample --run runs/emoji --prompt pizza --guidance 4 --guide apg momentum=-0.5 low=0.2 rescale=0.7 --out pictures\n"
        '  diffjax sample --cascade runs/base64 runs/super256 --prompt "a lighthouse" --out pictures\n'
        "  diffjax sample --replay pictures/manifest.json --out again\n",
    )
    model = _add_model(parser, "a hub id, a folder in the layout of diffusers, or a single file of SD3.5")
    model.add_argument(
        "--cascade", nargs="+", metavar="DIR", help="trainings whose pictures each enlarges those before"
    )
    model.add_argument(
        "--config", metavar="FILE", help="a sampling experiment; fields are overridden by --config.NAME=value"
    )
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="the manifest.json of an earlier job: the same again (with --run or --model: moved there)",
    )
    num = {"default": 4, "help": "pictures of each prompt or label (default 4)"}
    options.add_flags(parser, Request, options.added(Request, Asked))
    parser.add_argument("--prompt-file", metavar="FILE", help="more prompts, one on a line")
    options.add_flags(parser, Asked, options.added(Asked, Method), num=num)
    parser.add_argument(
        "--quality",
        type=one_of("quality", "draft", "good", "reference"),
        metavar="NAME",
        help="draft: 10 steps of the best solver, good: 25, reference: 1000 ancestral ones; what is given beside it wins",
    )
    options.add_flags(parser, Method)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what is in DIR")
    parser.add_argument(
        "--preview", type=int, metavar="N", help="show pictures under way every N steps; 0 never (default: every 3 s)"
    )
    parser.set_defaults(run=lambda args: _draw(args, parser))


def _draw(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int | None:
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
    if args.config:
        _refuse_beside("--config", "as --config.NAME=value", args, parser)
    request = job.requested(args)
    devices.start()
    job.generate(job.preset(request), args.out, preview=args.preview, overwrite=args.overwrite)


def _refuse_beside(
    flag: str, whence: str, args: argparse.Namespace, parser: argparse.ArgumentParser, *but: str
) -> None:
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if given := given - {"command", "debug", flag.lstrip("-"), "out", "preview", "overwrite", *but}:
        raise UserError(f"{flag} takes {', '.join(sorted(given))} {whence}: leave them out")


def _add_model(parser: argparse.ArgumentParser, kinds: str, required: bool = False) -> Any:
    """The flags of a run or a published model, of which one is given, and of which of its forms."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--run", dest="workdir", metavar="DIR", help="the --workdir of a training")
    group.add_argument("--model", metavar="ID", help=kinds)
    return group


def _explain(subparsers) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="write a page that shows how a picture was made, step by step",
        description="Draw a picture once more and write one page about it: from noise to the picture with the numbers of\n"
        "every step, what each word and guidance did, where it comes from, what it cost, how the run was trained. The page\n"
        "needs nothing beside it; its pictures are in DIR/pictures, its numbers in DIR/numbers.json.",
        epilog="examples:\n"
        '  diffjax explain --run runs/emoji --prompt "red heart" --seed 0 --out page\n'
        "  diffjax explain --model google/ddpm-cat-256 --steps 25 --sampler dpmpp_2m --out page\n"
        "  diffjax explain --config experiments/ddpm_cat256.py --out page\n",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", dest="workdir", metavar="DIR", help="the --workdir of a training")
    model.add_argument("--model", metavar="ID", help="a hub id, or a folder in the layout of diffusers")
    model.add_argument("--config", metavar="FILE", help="a sampling experiment; --config.NAME=value overrides a field")
    _add_which(parser)
    parser.add_argument("--dtype", type=one_of("dtype", "float32", "bfloat16"), help="what to compute in")
    parser.add_argument("--prompt", metavar="TEXT", help="what is drawn")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--label", metavar="CLASS", help="a class by name or number")
    parser.add_argument("--size", type=pixels, help="pixels a side, or WIDTHxHEIGHT")
    parser.add_argument("--seed", type=int, default=0, help="which noise: picture 0 of `diffjax sample` (default 0)")
    parser.add_argument("--steps", type=int, help="steps of the sampler (default, as for the next: the model's own)")
    parser.add_argument("--sampler", help="ddpm, ddim, euler, heun, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, unipc or ipndm")
    parser.add_argument("--grid", help="the times: uniform, logsnr, karras, leading, linspace, trailing or fitted")
    parser.add_argument("--guidance", type=float, metavar="W", help=GUIDANCE)
    add_guide(parser)
    parser.add_argument("--eta", type=float, help="fresh noise in each step, from 0 to 1")
    parser.add_argument("--out", required=True, metavar="DIR", help="where index.html goes")

    def run(args) -> None:
        from diffjax import explain
        from diffjax.parallel import devices

        request = explain.requested(args)
        devices.start()
        print(f"open {explain.write(request, args.out)} in a browser")

    parser.set_defaults(run=run)


def _words(subparsers) -> None:
    parser = subparsers.add_parser(
        "words",
        help="list the words that a run can read, with how often its captions have them",
        description="List the words of the captions that a run was trained on, the most frequent first. A run that reads\n"
        "its prompts with such words (`text.name` words) knows no others.",
        epilog="examples:\n  diffjax words --run runs/emoji\n  diffjax words --run runs/emoji | grep heart\n",
    )
    parser.add_argument("--run", dest="workdir", required=True, metavar="DIR", help="the --workdir of a training")

    def run(args) -> None:
        from diffjax.text import reading
        from diffjax.train import experiment

        print(reading.listing(experiment.words(args.workdir)))

    parser.set_defaults(run=run)


def _evaluate(subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure how well a text-to-image run draws its training prompts, or a stage of a cascade enlarges",
        description="Draw training prompts and compare with the training pictures: retrieval top-1 and PSNR. Of a stage that\n"
        "enlarges: PSNR on the pictures of config.data.held_out, against bicubic interpolation.\n"
        "It draws as the run's config says, but for what is given. The result goes to evaluation.json and evaluation.png\n"
        "in the run's folder.",
        epilog="examples:\n"
        "  diffjax evaluate --run runs/emoji\n"
        "  diffjax evaluate --run runs/emoji --num 16 --guidance 3\n",
    )
    parser.add_argument("--run", dest="workdir", required=True, metavar="DIR", help="the --workdir of a training")
    parser.add_argument("--num", type=int, default=64, help="prompts or pictures (default 64)")
    options.add_flags(parser, Method)
    parser.add_argument("--seed", type=int, default=0, help="which prompts, and the noise (default 0)")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")

    def run(args) -> None:
        from diffjax.evaluate.runs import evaluate
        from diffjax.loading import run_folder
        from diffjax.parallel import devices

        workdir = run_folder(args.workdir)
        devices.start()
        evaluate(workdir, args.num, seed=args.seed, step=args.step, **options.given(Method, args))

    parser.set_defaults(run=run)


def _plan(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say what a job will cost before it runs: memory, operations, time",
        description="Print parameters, bytes, peak memory, floating-point operations and the predicted time of drawing\n"
        "with a model, or of training an experiment and drawing with it. Nothing is computed and no weights are read;\n"
        "the first call measures this machine's speed for a few seconds.",
        epilog="examples:\n"
        "  diffjax plan --model google/ddpm-cat-256 --steps 25 --num 4\n"
        "  diffjax plan --model stabilityai/stable-diffusion-3.5-large --size 1024 --steps 28 --device h100\n"
        "  diffjax plan --run runs/emoji --sampler heun\n"
        "  diffjax plan --config experiments/emoji64.py --device h100 --config.train.batch=512\n",
    )
    what = _add_model(parser, "a hub id, or a folder in the layout of diffusers", required=True)
    what.add_argument("--config", metavar="FILE", help="an experiment; any field can be overridden: --config.a.b=value")
    options.add_flags(parser, Request, ("revision", "variant"))
    dtype = {"type": str, "help": "float32 or bfloat16 (default: float32, of latent models bfloat16)"}
    options.add_flags(parser, Asked, num={"help": "pictures in all (default 1)"}, dtype=dtype)
    parser.add_argument(
        "--device", metavar="NAME", help="h100, h200, a100, t4, v5e or cpu; default: the one found here"
    )
    parser.add_argument("--compile", action="store_true", help="compile, for the exact peak memory")

    def run(args) -> None:
        from diffjax import plan
        from diffjax.loading import run_folder
        from diffjax.parallel import devices

        devices.find()
        asked = Asked(**options.given(Asked, args))
        if args.model:
            jobs = plan.model(args.model, asked, args.revision or None, args.variant)
        elif args.revision or args.variant:
            raise UserError("--revision and --variant are of --model: leave them out")
        elif args.config:
            jobs = plan.config(_for_device(args.config, args.device), asked)
        else:
            jobs = plan.run(run_folder(args.workdir), asked)
        print("\n\n".join(plan.report(job, args.device, args.compile) for job in jobs))

    parser.set_defaults(run=run)


def _for_device(config: Any, device: str | None) -> Any:
    """The config as an accelerator that is not here would train it: a dtype "auto" is bfloat16 there."""
    from diffjax.config import decided

    return decided(config, lambda _: "bfloat16") if device not in (None, "cpu") else config


def _fit_grid(subparsers) -> None:
    parser = subparsers.add_parser(
        "fit-grid",
        help="fit the times of a few-step solver to a model",
        description="Search the time grid with which a solver of few steps ends nearest to its own fine solution, by gradient\n"
        "descent through the sampler; print its error on other seeds beside that of the named grids, and keep it with the\n"
        "model, where `--grid fitted` finds it. Each iteration costs about four drawings of all seeds.",
        epilog="examples:\n"
        "  diffjax fit-grid --model google/ddpm-cifar10-32 --steps 10\n"
        "  diffjax fit-grid --run runs/emoji --steps 8 --sampler dpmpp_2m --prompt pizza --prompt rocket\n",
    )
    _add_model(parser, "a hub id, or a folder in the layout of diffusers", required=True)
    options.add_flags(parser, Request, ("revision", "variant"))
    steps = {"required": True, "help": "steps of the grid"}
    sampler = {"default": "unipc", "help": "a sampler without noise (default unipc)"}
    options.add_flags(parser, Method, ("steps", "sampler", "guidance", "guide"), steps=steps, sampler=sampler)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="can be repeated: the images take turns")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="images to fit to (default 8)")
    parser.add_argument("--iterations", type=int, default=60, metavar="N", help="of the descent (default 60)")

    def run(args) -> None:
        from diffjax import fit_grid
        from diffjax.loading import load, run_folder
        from diffjax.models import fitted
        from diffjax.parallel import devices

        name = run_folder(args.workdir) if args.workdir else args.model
        devices.start()
        loaded, method = (
            load(name, revision=args.revision or None, variant=args.variant),
            Method(**options.given(Method, args)),
        )
        how = {"prompt": args.prompt, "seeds": args.seeds, "iterations": args.iterations}
        found = fit_grid.fit(loaded, method, shown=fit_grid.progress, **how)
        print(fit_grid.report(found))
        print(f"kept in {fit_grid.keep(loaded.name, args.sampler, found)}: sample with")
        print(f"  --steps {args.steps} --sampler {args.sampler} --grid fitted{fitted.flags(found.to)}")

    parser.set_defaults(run=run)


def _convert(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="write a model for other programs: diffusers, or Orbax",
        description="Write a U-Net that was trained on a discrete process as a folder that diffusers.DDPMPipeline.from_pretrained\n"
        "loads and samples to the same numbers, the transformer or the adapters of a fine-tuned Stable Diffusion 3 as\n"
        "diffusers reads them, or the parameters of any model as an Orbax checkpoint.",
        epilog="examples:\n  diffjax convert runs/ddpm ddpm\n  diffjax convert google/ddpm-cat-256 cat.orbax --to orbax\n",
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, one in the layout of diffusers, or a hub id")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    options.add_flags(parser, Request, ("revision", "variant"))
    parser.add_argument(
        "--to", type=one_of("format", "diffusers", "orbax"), default="diffusers", help="diffusers or orbax"
    )

    def run(args) -> None:
        from diffjax.convert import convert
        from diffjax.parallel import devices

        devices.find()
        convert(args.model, args.out, args.to, args.revision or None, args.variant)
        print(f"{args.out} is written")

    parser.set_defaults(run=run)


def _one_line(message: Warning | str, *place: object) -> str:
    return f"diffjax: {message}\n"


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
