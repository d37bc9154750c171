"""Every benchmark of docs/benchmarks.md on this machine, one after the other, and one page of what each printed.

    python scripts/bench.py [--quick] [--only start "demo step"] [--out docs/benchmarks.md]

Ratios are within one run, where the programs take turns; beside each stand its seconds, its CPU time, which other
programs on the machine disturb less, and its peak memory. The demo is trained, evaluated and explained in `--run`,
torch's times need the extra `reference`. `--quick` takes minutes: fewer rounds, and without what takes long. A page
that has a place for it keeps what stands around that.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from turns import measure, serve, show

SCRIPTS = Path(__file__).parent
KINDS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
DTYPES = ("float32", "bfloat16")


class Benchmark(NamedTuple):
    """Arguments of a Python; those of `--quick`, None where it leaves this out; {run} is the folder of the demo."""

    whole: tuple[str, ...]
    quick: tuple[str, ...] | None


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """The arguments of a Python that runs a script beside this one."""
    return (str(SCRIPTS / name), *arguments)


DEMO = ("--config", "experiments/emoji.py")
EXPLAIN = ("-m", "diffjax", "explain", "--run", "{run}", "--prompt", "red heart", "--out", "{run}/page")
EVALUATE = ("-m", "diffjax", "evaluate", "--run", "{run}")
BEST = ("torch channels_last", "diffjax", "diffjax oneDNN")  # all at once would need too much memory
TRAINING = ("--train", "--rounds", "3", "--dtype", *DTYPES, "--variants", *BEST)
BENCHMARKS = {
    "start": Benchmark(script("bench_start.py"), script("bench_start.py", "--warm", "1")),
    "demo": Benchmark(("-m", "diffjax", "train", *DEMO, "--workdir", "{run}"), None),
    "demo step": Benchmark(script("bench.py", "--part", "step"), script("bench.py", "--part", "step", "--rounds", "2")),
    "demo quality": Benchmark((*EVALUATE, "--num", "200"), (*EVALUATE, "--num", "64")),
    "demo explained": Benchmark(EXPLAIN, EXPLAIN),
    "cat-256": Benchmark(script("bench_ddpm.py", "--batch", "1", "--rounds", "3", "--dtype", *DTYPES), None),
    "cat-256, batch 4": Benchmark(script("bench_ddpm.py", "--batch", "4", "--rounds", "3", "--variants", *BEST), None),
    "training a U-Net": Benchmark(script("bench_ddpm.py", *TRAINING), None),
    "block of SD3.5": Benchmark(
        script("bench_sd35.py", "--block"), script("bench_sd35.py", "--block", "--rounds", "2")
    ),
    "plan": Benchmark(script("plan_table.py"), None),
    "convergence": Benchmark(script("convergence.py"), None),
    "evaluations": Benchmark(script("nfe.py"), None),
    "quantization": Benchmark(script("quantization_table.py"), None),
}


BEGIN, END = "<!-- python scripts/bench.py writes what follows -->", "<!-- up to here -->"


class Ran(NamedTuple):
    """A benchmark that was run: the command, its exit status, seconds, CPU seconds, the peak of its memory in MB (of
    its largest process) and what it printed.
    """

    command: str
    status: int
    seconds: float
    cpu: float
    peak: float
    printed: str


def run(arguments: Sequence[str]) -> Ran:
    """Run a Python with these arguments."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        errors.seek(0)
        printed = said.read() + (errors.read()[-500:] if status else "")
    seconds, cpu, peak = time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    command, printed = (
        text.replace(f"{SCRIPTS.parent}/", "") for text in (shlex.join(["python", *arguments]), printed)
    )
    return Ran(command, process.returncode, seconds, cpu, peak, printed)


def machine() -> str:
    """What computes, and which code."""
    import jax

    from diffjax.utils import processor, provenance

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = {line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    flags = [flag for flag in KINDS if flag in processor.flags()]
    git = provenance.git_state(SCRIPTS.parent) or {}
    commit = f"{git.get('commit', 'none')[:7]}{', changed' if git.get('dirty') else ''}"
    name = ", ".join(sorted(models)) or platform.processor() or platform.machine()
    return (
        f"{name}, {os.cpu_count()} cores, {' '.join(flags) or 'no known flags'}; jax {jax.__version__}; commit {commit}"
    )


def page(where: str, ran: dict[str, Ran]) -> str:
    """The machine, the table and what each benchmark printed, in Markdown."""
    rows = [
        f"| {name} | `{one.command}` | {'done' if not one.status else f'failed ({one.status})'} | {one.seconds:.0f} |"
        f" {one.cpu:.0f} | {one.peak:.0f} |"
        for name, one in ran.items()
    ]
    heading = ["## One machine", "", where, "", "| what | command | | seconds | CPU seconds | peak MB |"]
    printed = [f"### {name}\n\n```\n{one.printed.strip()}\n```\n" for name, one in ran.items()]
    return "\n".join([*heading, "|---|---|---|---|---|---|", *rows, "", *printed])


def write(path: Path, text: str) -> None:
    """Write a page, or, of one that has a place for it, only what stands there."""
    there = path.read_text() if path.exists() else ""
    before, begin, rest = there.partition(BEGIN)
    _, end, after = rest.partition(END)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}" if begin and end else text)


def training_step(dtype: str):
    """A function that does one step of training the demo, everything in one dtype."""
    import jax

    from diffjax import config
    from diffjax.train.experiment import Experiment
    from diffjax.train.state import create

    settings = config.load("experiments/emoji.py")
    for table in (settings.dit, settings.text, settings.optimizer):
        table.dtype = dtype
    experiment = Experiment.before_data(settings)
    state = create(experiment.init(jax.random.key(0)), experiment.optimizer, jax.random.key(1))
    shapes = experiment.batch_shapes(settings.train.batch)
    batch = {name: jax.numpy.ones(of.shape, of.dtype) for name, of in shapes.items()}
    step = jax.jit(experiment.step())
    return lambda: jax.block_until_ready(step(state, batch))


def step(rounds: int) -> None:
    """A step of training the demo in each dtype, in turns."""
    print("one step of training the demo")
    show(measure({dtype: ["--worker", dtype] for dtype in DTYPES}, rounds), DTYPES[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minutes")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--run", default="runs/emoji", help="the run of the demo (default runs/emoji)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks_here.md"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("step",), help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(training_step(args.worker))
    if args.part:
        return step(args.rounds)
    where, ran = machine(), {}  # before any benchmark writes a figure of the docs
    for name in args.only:
        if arguments := BENCHMARKS[name][args.quick]:
            print(f"{name} ...", flush=True)
            ran[name] = run([argument.replace("{run}", args.run) for argument in arguments])
            write(args.out, page(where, ran))
    print(f"{args.out} has what they printed")


if __name__ == "__main__":
    main()
