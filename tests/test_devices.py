"""The precision of convolutions; what comes of it is tested on a GPU."""

import pytest
import torch

from lossgeometry.running.devices import full_precision

cudnn = torch.backends.cudnn


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_off_inside_and_as_before_outside(monkeypatch, allowed):
    monkeypatch.setattr(cudnn, "allow_tf32", allowed)
    with pytest.raises(KeyError), full_precision():
        assert not cudnn.allow_tf32
        raise KeyError
    assert cudnn.allow_tf32 == allowed


@pytest.mark.skipif(not hasattr(cudnn, "conv"), reason="no setting for each operation")
def test_settings_for_each_operation_stay(monkeypatch):
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        with full_precision():
            assert cudnn.conv.fp32_precision == "ieee"
        assert cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision = before
