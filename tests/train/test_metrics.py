import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.train import metrics
from diffjax.train.preview import Preview
from diffjax.utils import image
from diffjax.utils.errors import UserError
from diffjax.utils.image import read_png

CONFIG = ConfigDict(
    {
        "train": {"steps": 9, "batch": 4},
        "optimizer": {"learning_rate": 0.5},
        "log": {"tensorboard": True, "wandb": ""},
    }
)


def values(loss, finite=True):
    sums, counts = np.zeros(10), np.zeros(10)
    sums[5], counts[5], sums[0], counts[0] = 3 * loss, 3, 10.0, 1
    return {"loss": loss, "grad_norm": 2.0, "finite": finite, "bin_sum": sums, "bin_count": counts}


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_summary_weighs_bins_by_examples():
    summary = metrics.summary([values(1.0), values(2.0)])
    assert summary == {"loss": 1.5, "grad_norm": 2.0, "loss_by_logsnr": {"-9": 10.0, "1": 1.5}}


def test_rows_reach_every_writer(tmp_path):
    with metrics.Log(tmp_path, CONFIG, 0, lambda step: 0.1) as log:
        for step in (1, 2):
            log.add(step, np.arange(4), values(float(step)))
        assert log.flush() is None
        assert log.mean_loss() == 1.5
        log.preview(2, Preview(np.zeros((5, 8, 8, 3)), 3, []))
    (row,) = rows(tmp_path)
    assert row["step"] == 2 and row["loss"] == 1.5 and row["learning_rate"] == 0.05 and row["images_per_second"] > 0
    assert list((tmp_path / "tensorboard").iterdir())
    picture, _ = read_png(tmp_path / "samples" / "0000002.png")
    np.testing.assert_array_equal(picture, image.sheet(image.to_uint8(np.zeros((5, 8, 8, 3))), 3, []))


def test_the_first_step_that_is_not_finite_is_returned(tmp_path):
    with metrics.Log(tmp_path, CONFIG, 0, lambda step: 1.0) as log:
        for step, finite in [(1, True), (2, False), (3, False)]:
            log.add(step, np.arange(4) + step, values(1.0, finite))
        broken = log.flush()
    assert broken.step == 2 and broken.rows.tolist() == [2, 3, 4, 5]
    assert rows(tmp_path) == []


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)) + '{"step": 4')
    writer = metrics.JsonLines(path, step=20)
    writer.write({"step": 21})
    writer.close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 21]


def test_wandb_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics.writers(tmp_path, ConfigDict({"log": {"tensorboard": False, "wandb": "project"}}), 0)


def test_without_a_terminal_each_row_is_a_line(capsys):
    with_rows = metrics.Terminal(0, 10)
    with_rows.write({"step": 5, "loss": 0.25, "images_per_second": 100.0, "seconds_per_step": 2.0})
    with_rows.picture(5, Path("runs/a[b][/]/5.png"))
    with_rows.close()
    said = "step 5 of 10: loss 0.2500, 100 images/s, 10 s left\nstep 5: runs/a[b][/]/5.png\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")], ids=str)
def test_a_terminal_that_is_gone_ends_nothing(tmp_path, monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stderr", Gone())
    with metrics.Log(tmp_path, CONFIG, 0, lambda step: 1.0) as log, log.compiling():
        for step in (1, 2):
            log.add(step, np.arange(4), values(1.0))
            assert log.flush() is None
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_event_files_are_opened_by_the_first_row(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # importing it fails
    writer = metrics.TensorBoard(tmp_path / "tensorboard", 0)
    writer.close()
    assert not writer.folder.exists()
    with pytest.raises(ImportError):
        writer.write({"step": 1, "loss": 0.5})
