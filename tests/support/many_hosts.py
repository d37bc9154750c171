"""Several processes on this machine, joined as hosts of one job are."""

import os
import socket
import subprocess
import sys

from quick import QUICK


def start(number, arguments, devices=1, **environment):
    """That many processes of a command of `diffjax`, each with so many devices."""
    return run(number, [sys.executable, "-m", "diffjax", *map(str, arguments)], devices, **environment)


def run(number, command, devices=1, **environment):
    """That many processes of any command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
        **({"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number)} if number > 1 else {}),
    }
    return [
        subprocess.Popen(
            command,
            env=shared | {"JAX_PROCESS_ID": str(i)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(number)
    ]


def finish(processes, status=0, timeout=300):
    """What they have said, once all have ended with that status."""
    said = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), said
    return said
