"""Benchmarks on a CPU whose variants are processes that take turns: one call each a round, so that a busy machine is
unfair to none. Each runs as installed and with the tuned allocator (glibc keeps its memory).
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "64000000000", "MALLOC_TOP_PAD_": "268435456"}


def once(function):
    """The seconds of one call, and its CPU seconds: of the second, a busy machine takes no more."""
    begin, start = time.process_time(), time.perf_counter()
    function()
    return dict(seconds=time.perf_counter() - start, cpu=time.process_time() - begin)


def timed(function):
    """The seconds of one call."""
    return once(function)["seconds"]


def say(**values):
    """Answer the process that started this one."""
    print(json.dumps(values), flush=True)


def serve(function):
    """Answer every line on stdin with what one call takes; the first answer is that of the first call."""
    say(**once(function))
    for _ in sys.stdin:
        say(**once(function))
    say(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class Worker:
    """A variant in its process: this script again, with arguments that make it `serve`."""

    def __init__(self, arguments, tuned):
        command = [sys.executable, sys.argv[0], *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (TUNED if tuned else {})
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.first = self.answer()["seconds"]
        self.seconds, self.cpu = [], []

    def answer(self):
        """What the process says next, by name."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{' '.join(self.process.args[2:])} ended without an answer (exit code {self.process.wait()})")

    def run(self):
        """One call."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        taken = self.answer()
        self.seconds.append(taken["seconds"])
        self.cpu.append(taken["cpu"])

    def close(self):
        """The peak of memory, in MB."""
        self.process.stdin.close()
        peak = self.answer()["peak"]
        self.process.wait()
        return peak


def measure(variants, rounds):
    """One line a variant (name: arguments) and allocator: median and best seconds, the least CPU seconds, the first
    call's, the peak of memory.
    """
    chosen = [(variant, tuned) for variant in variants for tuned in (False, True)]
    workers = [Worker(variants[variant], tuned) for variant, tuned in chosen]
    for _ in range(rounds):
        for worker in workers:
            worker.run()
    return [
        dict(
            variant=variant,
            tuned=tuned,
            median=statistics.median(worker.seconds),
            best=min(worker.seconds),
            cpu=min(worker.cpu),
            first=worker.first,
            peak=worker.close(),
        )
        for (variant, tuned), worker in zip(chosen, workers)
    ]


def show(lines, base):
    """Print the lines, and the ratios of their median and CPU seconds to the variant `base` as installed."""
    whole = next((line for line in lines if line["variant"] == base and not line["tuned"]), None)
    print(f"{'variant':22}allocator     median s   best s    CPU s  / {base} (CPU)  first s  peak MB")
    for line in lines:
        ratios = [f"{line[name] / whole[name]:.2f}" for name in ("median", "cpu")] if whole else ["", ""]
        print(
            f"{line['variant']:22}{'tuned' if line['tuned'] else 'installed':12}"
            f"{line['median']:10.3f}{line['best']:9.3f}{line['cpu']:9.3f}"
            f"{'{} ({})'.format(*ratios):>{len(base) + 10}}{line['first']:9.1f}{line['peak']:9.0f}",
            flush=True,
        )
