"""Kill jobs at random instants, and hold what they end with to what a job makes that nobody disturbs.

    python scripts/kill_test.py --out kills --runs 200                 goes on after the trials that are there
    python scripts/kill_test.py --out kills --summary                  counts what was run

A trial is one job (train, sample, prepare, convert) with one fault, drawn from (seed, number of the trial):

    kill       SIGKILL at one to three random instants
    cut        the power goes at a random rename or sync: names that no sync of their folder has kept are undone, files
               that were renamed before they were synced, alone or with their folder, are cut short
    full       the disk (a tmpfs; needs root) is full at a random size
    limit      no file may grow beyond a random size (RLIMIT_FSIZE)
    truncate   after a kill, or the end, a file of the job is cut short
    flip       the same with one byte changed

Then the same command goes on undisturbed. The SHA-256 of what it ends with must be that of the undisturbed job; a job
may refuse a damaged file or a full disk in one line, as a user's error, and goes on once it is mended. Jobs are forked
from a process that has imported everything and started no device; programs come from a compilation cache.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = ("kill", "cut", "full", "limit", "truncate", "flip")
PATIENCE = 600
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
STEPS, SAVE_EVERY = 12, 3

CONFIG = """
from diffjax.config.kinds import ddpm

def get_config():
    return ddpm(
        name="kills",
        data={{"name": "captioned_folder", "path": "{pictures}", "size": 16}},
        unet={{
            "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
        }},
        optimizer={{"learning_rate": 1e-3, "schedule": {{"warmup": 2}}}},
        train={{"steps": {steps}, "batch": 8, "ema": 0.9, "log_every": 1, "save_every": {every}, "preview_every": 0}},
        log={{"tensorboard": False}},
        sample={{"steps": 2, "num": 2}},
    )
"""


class Job(NamedTuple):
    """A command, what of a trial's folder it writes, and the SHA-256 of what it has made there."""

    words: Callable[[Path, Path], list[str]]
    writes: str
    digest: Callable[[Path], str]


def hashed(parts: Any) -> str:
    """SHA-256 of bytes, one after the other."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def of_files(folder: Path) -> str:
    """Of all files but manifests, which hold the time, with their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return hashed(part for path in files for part in (str(path.relative_to(folder)).encode(), path.read_bytes()))


def of_arrays(*folders: Path) -> str:
    """Of all leaves of Orbax's trees, with their names, read as diffjax reads them: as numpy arrays."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    def parts():
        for folder in folders:
            reader = ocp.PyTreeCheckpointer()
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                reader.metadata(folder.absolute()).item_metadata.tree,
            )
            tree = reader.restore(folder.absolute(), restore_args=as_numpy)
            for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda pair: str(pair[0])):
                yield from (str(path).encode(), np.asarray(leaf).tobytes())

    return hashed(parts())


def of_run(folder: Path) -> str:
    """Of the parameters, averages and optimizer of a run's last checkpoint."""
    last = max((path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    assert int(last.name) == STEPS, f"the last checkpoint is of step {last.name}"
    return of_arrays(*(last / name for name in ("params", "ema", "optimizer")))


def of_data(home: Path) -> str:
    """Of all records of the prepared data."""
    import diffjax.data
    from diffjax import config

    records = diffjax.data.load(config.load(os.environ["KILL_CONFIG"]).data).records
    return hashed(repr(records[i]).encode() for i in range(len(records)))


def drawing(format: str) -> Job:
    """A sampling job of that format."""
    words = ["--num", "10", "--batch", "2", "--steps", "4", "--sampler", "ddim", "--format", format, "--per-file", "4"]
    return Job(
        lambda base, trial: ["sample", "--run", str(base / "run"), "--out", str(trial / "drawn"), *words],
        "drawn",
        lambda trial: of_files(trial / "drawn"),
    )


def converting(to: str, digest: Callable[[Path], str]) -> Job:
    """A conversion of a run."""
    words = lambda base, trial: ["convert", str(base / "run"), str(trial / "converted"), "--to", to]
    return Job(words, "converted", lambda trial: digest(trial / "converted"))


def _train_words(base: Path, trial: Path) -> list[str]:
    return ["train", "--config", str(base / "config.py"), "--workdir", str(trial / "run")]


JOBS = {
    "train": Job(_train_words, "run", lambda trial: of_run(trial / "run")),
    "sample": drawing("png"),
    "sample tar": drawing("webdataset"),
    "sample records": drawing("array_record"),
    "prepare": Job(
        lambda base, trial: ["prepare", "--config", str(base / "config.py")],
        "home/data",
        lambda trial: of_data(trial / "home"),
    ),
    "convert": converting("diffusers", of_files),
    "convert orbax": converting("orbax", of_arrays),
}


class PowerCut:
    """Renames and syncs of this process, counted; at number `at` the power goes."""

    def __init__(self, at: int, seed: int, aside: Path):
        self.at, self.random, self.aside = at, random.Random(seed), aside
        self.count, self.synced, self.pending = 0, set(), []
        self.real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
        os.fsync = self.fsync
        os.replace = os.rename = self.replace

    def fsync(self, handle: int) -> None:
        """A sync keeps a file's content, or the names in a folder."""
        self.real["fsync"](handle)
        place = os.path.realpath(f"/proc/self/fd/{handle}")
        if os.path.isdir(place):
            self.pending = [rename for rename in self.pending if os.path.dirname(rename[1]) != place]
        else:
            self.synced.add(_version(os.fstat(handle)))
        self.tick()

    def replace(self, source: Any, target: Any, **dirs: Any) -> None:
        """A rename, which nothing keeps yet."""
        self.tick()
        source, target = (
            os.path.realpath(source),
            os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target)),
        )
        kept = None
        if os.path.isfile(target):
            kept = str(self.aside / f"kept{self.count}")
            shutil.copy(target, kept)
        self.real["replace"](source, target, **dirs)
        self.pending.append((source, target, kept))
        self.tick()

    def tick(self) -> None:
        """Count an event."""
        self.count += 1
        if self.count == self.at:
            self.cut()

    def cut(self) -> None:
        """Undo the last of what is not kept, spoil what was never synced, and end."""
        first = self.random.randint(0, len(self.pending))
        for source, target, kept in reversed(self.pending[first:]):
            if os.path.lexists(target):
                self.real["replace"](target, source)
            if kept:
                self.real["replace"](kept, target)
        for _, target, _ in self.pending[:first]:
            for path in (Path(target), *sorted(Path(target).rglob("*"))):
                if path.is_file() and _version(path.stat()) not in self.synced:
                    os.truncate(path, self.random.randint(0, path.stat().st_size))
        os.kill(os.getpid(), signal.SIGKILL)


class Ended(NamedTuple):
    """How a forked process ended: its exit status (negative: the signal), what it said, and its seconds."""

    status: int
    said: str
    seconds: float


def forked(work: Callable[[], int], log: Path, kill_after: float | None = None, **environment: str) -> Ended:
    """Run `work` in a fork, what it says in a file; kill it after so many seconds."""
    receive, send = os.pipe()  # not a file, which a limit would cut
    fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, 2**20)
    begin, pid = time.monotonic(), os.fork()
    if not pid:
        _child(work, send, environment)
    os.close(send)
    left = begin + (PATIENCE if kill_after is None else kill_after)
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() >= left:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    hangs = kill_after is None and time.monotonic() >= left
    with open(receive, "rb") as pipe:
        said = pipe.read().decode(errors="replace") + "\nKILL TEST: it hangs" * hangs
    log.write_text(said)
    return Ended(os.waitstatus_to_exitcode(done[1]), said, time.monotonic() - begin)


def _child(work: Callable[[], int], send: int, environment: dict[str, str]) -> None:
    status = 99
    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        os.dup2(send, 1), os.dup2(send, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.environ.update(environment)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


class Trial:
    """One job with one fault, in a folder of its own."""

    def __init__(self, bench: "Bench", number: int):
        self.bench, self.number, self.random = bench, number, random.Random(f"{bench.seed} {number}")
        self.name, self.fault = self.random.choice([*JOBS]), self.random.choice(bench.faults)
        self.job, self.folder, self.logs = JOBS[self.name], bench.out / "trial", bench.out / "logs"
        self.lost: list[int] = []
        self.refused = ""

    def run(self) -> dict[str, Any]:
        """Disturb the job, let it go on, and say how it ended."""
        begin, facts = time.monotonic(), self.bench.facts[self.name]
        for folder in (self.folder, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        with self.bench.small_disk(self) if self.fault == "full" else contextlib.nullcontext():
            try:
                getattr(self, self.fault)(facts)
                problem = self.problem(facts)
            except AssertionError as error:
                problem = str(error)
        said = {"number": self.number, "job": self.name, "fault": self.fault, "problem": problem}
        return said | {"lost": self.lost, "refused": self.refused, "seconds": round(time.monotonic() - begin, 1)}

    def call(self, log: str, kill_after: float | None = None, before: Callable[[], Any] = lambda: None) -> Ended:
        """The job's command once."""
        from diffjax import cli

        words = self.job.words(self.bench.base, self.folder)
        reached = self.reached()
        ended = forked(lambda: (before(), cli.main(words))[1], self.logs / log, kill_after, **self.environment())
        going_on = re.search(r"going on from step (\d+)", ended.said)
        if reached and (going_on or "step 1 of" in ended.said):
            self.lost.append(max(0, reached - int(going_on[1] if going_on else 0)))
        return ended

    def environment(self) -> dict[str, str]:
        """That of the job: only preparing has a cache folder of its own."""
        home = self.folder if self.name == "prepare" else self.bench.base
        return {"DIFFJAX_HOME": str(home / "home"), "KILL_CONFIG": str(self.bench.base / "config.py")}

    def reached(self) -> int:
        """The last step that a training has logged."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return json.loads((self.folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def kill(self, facts: dict[str, Any]) -> None:
        """SIGKILL at random instants."""
        for i in range(self.random.randint(1, 3)):
            self.call(f"killed{i}", self.random.uniform(0, facts["seconds"]))

    def cut(self, facts: dict[str, Any]) -> None:
        """The power goes at a random rename or sync."""
        at, seed = self.random.randint(1, facts["events"]), self.random.randrange(2**32)
        self.call("cut", before=lambda: PowerCut(at, seed, self.logs))

    def full(self, facts: dict[str, Any]) -> None:
        """The disk is full; `Bench.small_disk` has made it so."""
        self.refusal(self.call("full"))
        self.bench.make_room(self)

    def limit(self, facts: dict[str, Any]) -> None:
        """No file may grow beyond a size."""
        size = int(2 ** self.random.uniform(0, 16))
        self.refusal(self.call("limit", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))))

    def truncate(self, facts: dict[str, Any]) -> None:
        """A file is cut short."""
        self.damage(facts, lambda path, size: os.truncate(path, self.random.randrange(size)))

    def flip(self, facts: dict[str, Any]) -> None:
        """A byte is another one."""

        def change(path: Path, size: int) -> None:
            with path.open("r+b") as file:
                file.seek(place := self.random.randrange(size))
                old = file.read(1)[0]
                file.seek(place)
                file.write(bytes([old ^ self.random.randint(1, 255)]))

        self.damage(facts, change)

    def damage(self, facts: dict[str, Any], spoil: Callable[[Path, int], None]) -> None:
        """Spoil a file of a job that was killed or has ended; where the job refuses it, put it back."""
        self.call("killed", self.random.uniform(0.3, 1.5) * facts["seconds"])
        place = self.folder / self.job.writes
        found = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
        if not found:
            return
        path = self.random.choice(found)
        whole = path.read_bytes()
        spoil(path, len(whole))
        ended = self.call("damaged")
        if ended.status:
            self.refusal(ended)
            self.refused = f"{path.relative_to(self.folder)}: {self.refused}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)

    def refusal(self, ended: Ended) -> None:
        """Hold a job that did not end well to one line that is a user's."""
        if ended.status == 0:
            return
        lines = [line for line in ended.said.splitlines() if line.startswith("diffjax: ")]
        assert ended.status == 2 and lines, f"status {ended.status}: {ended.said[-600:]}"
        assert "Traceback" not in ended.said, f"a traceback: {ended.said[-600:]}"
        self.refused = lines[-1]

    def problem(self, facts: dict[str, Any]) -> str:
        """What is wrong with how the job ends when it goes on undisturbed; empty when nothing is."""
        ended = self.call("last")
        if ended.status == 2 and "is there already: name a new folder" in ended.said:
            if self.digest() == facts["digest"]:
                return ""
            shutil.rmtree(self.folder / self.job.writes)
            return (
                "" if self.call("again").status == 0 and self.digest() == facts["digest"] else "it is there, not whole"
            )
        if ended.status:
            return f"status {ended.status}: {ended.said[-600:]}"
        found = self.digest()
        return "" if found == facts["digest"] else f"ends with {found[:200]} instead of {facts['digest'][:12]}"

    def digest(self) -> str:
        """That of what the job has made."""
        ended = forked(
            lambda: print(f"digest {self.job.digest(self.folder)}") or 0, self.logs / "digest", **self.environment()
        )
        found = re.search(r"digest (\w+)", ended.said)
        return found[1] if found else ended.said[-600:]


class Bench:
    """The folder of a kill test: what jobs begin from, what they end with undisturbed, and the trials."""

    def __init__(self, out: Path, seed: int, faults: list[str]):
        self.out, self.seed, self.faults = out, seed, faults
        self.base, self.small = out / "base", out / "small"
        self.facts: dict[str, Any] = {}

    def prepare(self) -> None:
        """Make the base and the facts about undisturbed jobs, once."""
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.out / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        _imports()
        if (self.out / "facts.json").exists():
            self.facts = json.loads((self.out / "facts.json").read_text())
            return
        self.base.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        for i in range(16):
            _picture(self.base / "pictures" / f"{i}.png", draw)
        text = CONFIG.format(pictures=self.base / "pictures", steps=STEPS, every=SAVE_EVERY)
        (self.base / "config.py").write_text(text)
        for name in JOBS:
            self.facts[name] = self._fact(name)
            if name == "train":
                shutil.copytree(self.out / "trial" / "run", self.base / "run")
            print(f"{name}: {self.facts[name]}", flush=True)
        (self.out / "facts.json").write_text(json.dumps(self.facts, indent=1))

    def _fact(self, name: str) -> dict[str, Any]:
        """The digest, seconds and events of a job; the second time its programs are in the cache."""
        for _ in range(2):
            trial = Trial(self, 0)
            trial.name, trial.job = name, JOBS[name]
            for folder in (trial.folder, trial.logs):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            events = trial.logs / "events"
            ended = trial.call("whole", before=lambda events=events: _count_events(events))
            assert ended.status == 0, ended.said
            size = sum(path.stat().st_size for path in (trial.folder / trial.job.writes).rglob("*") if path.is_file())
        return {
            "digest": trial.digest(),
            "seconds": ended.seconds,
            "events": int(events.read_text()),
            "bytes": size,
        }

    @contextlib.contextmanager
    def small_disk(self, trial: Trial) -> Iterator[None]:
        """The trial's folder on a disk of a random size, up to that of what the job writes."""
        pages = max(1, int(trial.random.uniform(0, 1.3) * self.facts[trial.name]["bytes"]) // 4096)
        self.small.mkdir(exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", str(self.small))
        trial.folder = self.small
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.small)], check=True)

    def make_room(self, trial: Trial) -> None:
        """The same disk, larger."""
        _mount("-o", "remount,size=256m", str(self.small))

    def run(self, runs: int) -> None:
        """So many trials after those that are there."""
        path = self.out / "trials.jsonl"
        there = len(path.read_text().splitlines()) if path.exists() else 0
        for number in range(there, there + runs):
            told = Trial(self, number).run()
            with path.open("a") as file:
                file.write(json.dumps(told) + "\n")
            if told["problem"]:
                shutil.copytree(self.out / "logs", self.out / f"problem{number}", dirs_exist_ok=True)
                print(f"trial {number}, {told['job']}, {told['fault']}: {told['problem'][-200:]}", flush=True)

    def summary(self) -> str:
        """Counts of trials by job and fault, of refusals and problems, and the most steps that were lost."""
        told = [json.loads(line) for line in (self.out / "trials.jsonl").read_text().splitlines()]
        count = Counter((row["job"], row["fault"]) for row in told)
        head = f"{'':16}" + "".join(f"{fault:>10}" for fault in FAULTS)
        rows = [f"{job:16}" + "".join(f"{count[job, fault]:10}" for fault in FAULTS) for job in JOBS]
        spoiled = ("truncate", "flip")
        lost = Counter(steps for row in told if row["fault"] not in spoiled for steps in row["lost"])
        return "\n".join(
            [
                head,
                *rows,
                f"{len(told)} trials, {sum(bool(row['problem']) for row in told)} with a problem",
                f"{sum(bool(row['refused']) for row in told)} refused in one line and went on once mended",
                f"steps of training lost at a restart (a checkpoint every {SAVE_EVERY}): {dict(sorted(lost.items()))}",
            ]
        )


def _imports() -> None:
    """All that jobs import, and no device."""
    import jax
    import orbax.checkpoint
    import tensorflow_datasets

    import diffjax.convert
    import diffjax.sampling.job
    import diffjax.train.loop

    assert jax and orbax.checkpoint and tensorflow_datasets and diffjax.train.loop


def _count_events(path: Path) -> None:
    """From now on write how many renames and syncs there have been."""
    shim = PowerCut(0, 0, path.parent)
    tick = shim.tick
    shim.tick = lambda: (tick(), path.write_text(str(shim.count)))[0]


def _version(about: os.stat_result) -> tuple[int, int]:
    """Of a file: another one once it has been written to."""
    return about.st_ino, about.st_mtime_ns


def _picture(path: Path, draw: random.Random) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (16, 16), draw.randbytes(3 * 16 * 16)).save(path)
    path.with_suffix(".txt").write_text(f"thing {path.stem}\n")


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def can_mount(out: Path) -> bool:
    """Whether this process may mount a small disk."""
    place = out / "small"
    place.mkdir(parents=True, exist_ok=True)
    try:
        _mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of the test")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="only count what was run")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, args.seed, [fault for fault in FAULTS if fault != "full" or can_mount(out)])
    if not args.summary:
        bench.prepare()
        bench.run(args.runs)
    print(bench.summary())
    told = (out / "trials.jsonl").read_text().splitlines()
    return int(any(json.loads(line)["problem"] for line in told))


if __name__ == "__main__":
    sys.exit(main())
