"""Seconds from a command to its first picture, and to the first step of training, of every family.

    python scripts/bench_start.py [--only "closed form" transformer] [--warm 1]

Published models have random weights here: what they draw means nothing, how long it takes does. Cold is without
compiled programs, warm with those of the run before; the data are prepared already, and a run is trained for one step.
Beside the seconds stands the CPU time, which other programs on the machine disturb less.
"""

import argparse
import functools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "diffjax")
EXPERIMENTS = {
    "transformer": ROOT / "experiments/emoji.py",
    "base": ROOT / "experiments/minimagen/emoji_tiny_base32.py",
    "super": ROOT / "experiments/minimagen/emoji_tiny_super64.py",
}
ONE_STEP = ("--config.train.steps=1", "--config.train.log_every=1", "--config.train.preview_every=0")
FIRST_STEP = "first step of training the demo"
DRAWN = ("--num", "1", "--seed", "0")


class Took(NamedTuple):
    """Seconds and CPU seconds."""

    seconds: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} ({self.cpu:.2f})"


def timed(arguments: list[str]) -> Took:
    """A command to its end. Raises `SystemExit` where it fails."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        raise SystemExit(f"diffjax {' '.join(arguments)}: {ran.stderr[-500:]}")
    return Took(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def until_first_step(arguments: list[str]) -> Took:
    """A training to the line that tells of its first step, which ends it."""
    begin, took = time.perf_counter(), None
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("step 1 of"):
                took = Took(time.perf_counter() - begin, _cpu(run.pid))
                run.kill()
    if took is None:
        raise SystemExit(f"diffjax {' '.join(arguments)} made no step")
    return took


def _cpu(pid: int) -> float:
    """The CPU seconds of a process so far; not a number where there is no /proc."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return float("nan")
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def trained(folder: Path, kind: str) -> str:
    """A run of one step."""
    run = folder / "runs" / kind
    if not run.exists():
        timed(["train", "--config", str(EXPERIMENTS[kind]), "--workdir", str(run), *ONE_STEP])
    return str(run)


def pixel_model(folder: Path, published: str) -> str:
    """A published pixel model with random weights."""
    import jax
    import numpy as np

    from diffjax import weights

    own = shutil.copytree(ROOT / "diffjax/weights/published" / published, folder / published)
    module, random = weights.describe(own), np.random.default_rng(0)
    draw = lambda leaf: random.standard_normal(leaf.shape, np.float32) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    weights.save(own, module, jax.tree.map(draw, weights.shapes(module)))
    return str(own)


def latent_model(folder: Path) -> str:
    """A tiny Stable Diffusion 3.5 with random weights, as the tests have it."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    import sd3_folder  # pyright: ignore[reportMissingImports]

    return str(sd3_folder.write(folder / "sd3"))


def closed_form(folder: Path, prompt: tuple[str, ...]) -> list[str]:
    """The generator that is made of training pictures, once these are drawn."""
    arguments = ["--config", str(ROOT / "experiments/closed_form.py"), *prompt]
    first_picture(arguments, folder, "prepared")
    return arguments


def drawings(folder: Path) -> dict[str, Callable[[], list[str]]]:
    """What makes the arguments of `diffjax sample` for each family."""
    prompt = ("--prompt", "red heart")
    cascade = lambda: ["--cascade", trained(folder, "base"), trained(folder, "super"), *prompt]
    return {
        "closed form": lambda: closed_form(folder, prompt),
        "transformer, 8 steps": lambda: ["--run", trained(folder, "transformer"), *prompt],
        "cascade, tiny, 4 steps each": cascade,
        "ddpm-cifar10-32, 10 steps": lambda: ["--model", pixel_model(folder, "ddpm_cifar10_32"), "--steps", "10"],
        "ddpm-cat-256, 2 steps": lambda: ["--model", pixel_model(folder, "ddpm_256"), "--steps", "2"],
        "SD3.5, tiny, 4 steps": lambda: ["--model", latent_model(folder), "--prompt", "a cat", "--steps", "4"],
    }


def cold_and_warm(run: Callable[[str], Took], warm: int) -> Iterator[Took]:
    """The time of `run(name)` without compiled programs, then with them, the least of some."""
    shutil.rmtree(Path(os.environ["DIFFJAX_HOME"]) / "xla", ignore_errors=True)
    yield run("cold")
    yield min((run(f"warm{i}") for i in range(warm)), key=lambda took: took.cpu)


def first_step(folder: Path, name: str) -> Took:
    """Training the demo to its first step, in a new folder."""
    timed(["prepare", "--config", str(EXPERIMENTS["transformer"])])
    given = ("--config", str(EXPERIMENTS["transformer"]), "--workdir", str(folder / "steps" / name))
    return until_first_step(["train", *given, *ONE_STEP])


def first_picture(arguments: list[str], folder: Path, name: str) -> Took:
    """Drawing one picture into a new folder."""
    out = folder / "drawn" / name
    shutil.rmtree(out, ignore_errors=True)
    return timed(["sample", *arguments, *DRAWN, "--out", str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="rows whose name begins so")
    parser.add_argument("--warm", type=int, default=2, help="how often each is run warm; the least counts (default 2)")
    args = parser.parse_args()
    chosen = lambda name: not args.only or name.startswith(tuple(args.only))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ |= {"DIFFJAX_HOME": str(folder / "home"), "JAX_PLATFORMS": "cpu"}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        print("seconds from the command on (CPU seconds)       cold              warm")
        if chosen("help"):
            print(f"{'help: diffjax --help':40}{'':>18}{min(timed(['--help']) for _ in range(3))!s:>18}", flush=True)
        for name, arguments in {FIRST_STEP: lambda: [], **drawings(folder)}.items():
            if chosen(name):
                run = first_step if name == FIRST_STEP else functools.partial(first_picture, arguments())
                found = cold_and_warm(functools.partial(run, folder), args.warm)
                print(f"{name:40}", *(f"{took!s:>17}" for took in found), flush=True)


if __name__ == "__main__":
    main()
