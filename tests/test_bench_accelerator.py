"""The benchmark of accelerators says what it can, and goes on after what it cannot."""

import bench_accelerator
import pytest


def test_the_parts_together_take_less_than_nine_minutes():
    assert sum(part.seconds for part in bench_accelerator.PARTS.values()) < 540


def test_a_part_without_its_packages_is_one_line(monkeypatch, capsys):
    part = bench_accelerator.Part(lambda tiny: [], 10, ("no_such_package",))
    monkeypatch.setitem(bench_accelerator.PARTS, "device", part)
    assert not bench_accelerator.run("device", True)
    assert capsys.readouterr().out == "device: left out, for no_such_package is not installed\n"


@pytest.mark.parametrize(
    ("seconds", "line", "done"),
    [
        (60, "attention: SD3.5-large 1x64x38x64: fused (none)", True),
        (60, "attention: failed with status 1: RuntimeError: Unable to initialize backend", False),
        (0.1, "attention: stopped, for it took longer than its 0.1 s", False),
    ],
)
def test_a_part_says_its_lines_or_why_it_cannot(monkeypatch, capsys, seconds, line, done):
    part = bench_accelerator.PARTS["attention"]._replace(seconds=seconds)
    monkeypatch.setitem(bench_accelerator.PARTS, "attention", part)
    if "backend" in line:
        monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    assert bench_accelerator.run("attention", True) == done
    assert line in capsys.readouterr().out
