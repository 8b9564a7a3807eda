"""A stream in place of a folder, from calibration to evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qzoo
from qzoo.__main__ import main
from qzoo.config import config_of
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.pipeline.calibrate import calibrate_checkpoint
from qzoo.pipeline.parts import evaluation_images, measured_images
from qzoo.pipeline.plan import Job, Plan


def test_evaluation_leaves_out_what_a_stream_was_calibrated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = fashion_mnist("test")
    np.savez(tmp_path / "some.npz", images=images[:96].numpy()[:, 0], labels=labels[:96].numpy())
    data, out = f"npz:{tmp_path / 'some.npz'}", tmp_path / "out"
    job = Job(data=data, out=out, progress=False)
    calibrate_checkpoint("resnet20.fmnist-w8a8", Plan(calibration_subset=":24"), job)
    model = qzoo.load_pretrained(out)
    record = config_of(model).calibration
    assert record is not None
    assert (record.subset, record.images, record.skipped) == ("0:24", 24, 0)
    chosen, said = measured_images(config_of(model), data, None)
    assert (chosen.subset, said) == ("24:96", "24 images that it was made on are left out")
    assert main(["evaluate", str(out), "--data", data]) == 0
    assert "72 images (24 images that it was made on are left out)" in capsys.readouterr().out
    part = measured_images(config_of(model), data, "24:96")[0].load(config_of(model), data)
    expected = qzoo.data.load_data(config_of(model).preprocessing, "fashion-mnist", subset="24:96")
    torch.testing.assert_close(
        torch.cat([x for x, _ in part]), torch.cat([x for x, _ in expected]), rtol=0, atol=1e-6
    )
    with pytest.raises(qzoo.errors.DataError, match="share images"):
        evaluation_images(config_of(model), data, "0:30", chosen)
