"""How the suite runs: on the CPU, as eight devices, in a cache folder of its own, programs compiled quickly and once.

Most of its time is compilation, so XLA leaves out most optimizations and uses its older, quicker CPU emitters where
jax still has them, and all processes of a suite share what they compile. Modules that are about bits and devices take
`optimized`; with users' emitters too, they run by XLA_FLAGS=--xla_cpu_use_fusion_emitters=true bash scripts/test.sh.
"""

import gc
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from quick import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    programs = tempfile.TemporaryDirectory(prefix="diffjax_programs_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
DEVICES = "--xla_force_host_platform_device_count=8"
PATIENT = (
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # eight devices wait for each other on two busy cores
)
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')} {DEVICES} {PATIENT}"
gc.set_threshold(100_000, 50, 50)  # tracing makes many objects and few cycles

MANY_MAPS = 20_000  # of the 65,530 that Linux allows

OPTIONS = {
    "reference": "also run the comparisons with torch, diffusers and transformers",
    "slow": "also run the tests that take longer than a minute",
    "notebooks": "also run the notebooks",
    "accelerators": "also compile for TPUs and GPUs that are not here, as far as their compilers are installed",
}


def pytest_addoption(parser):
    for name, text in OPTIONS.items():
        parser.addoption(f"--{name}", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.get_closest_marker("notebooks"))  # the longest begin first
    for name in OPTIONS:
        if not config.getoption(f"--{name}"):
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"run with --{name}"))


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory):
    """Keep tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFJAX_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def in_the_foreground():
    """Signals mean something, in tests and their processes, though a shell ignores Ctrl-C for a suite in the
    background, and nohup the end of a terminal.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def optimized():
    """Programs as they are outside of tests; none of the other kind is met, since the two may differ in their
    last bits.
    """
    import jax

    def switch(off: bool) -> None:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", off)

    switch(False)
    yield
    switch(True)


@pytest.fixture
def compiler(optimized):
    """A function: skip unless programs can be compiled here for a kind of accelerator."""
    from diffjax.parallel import targets
    from diffjax.utils.install import has_compiler

    def need(kind: str) -> None:
        if not has_compiler(platform := targets.of(kind).platform):
            pytest.skip(f"the extra {platform} is not installed")

    return need


@pytest.fixture
def compilations():
    """A function: how many programs XLA has compiled so far in this test, which finds none of other tests."""
    import jax
    from jax import monitoring

    jax.clear_caches()
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seen)
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def float64():
    """Double precision, for this test only."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free what was compiled once it is much: every program keeps mapped memory, and a process may map only so much."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and (not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS):
        sys.modules["jax"].clear_caches()
