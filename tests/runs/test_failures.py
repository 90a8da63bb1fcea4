"""What a run keeps quiet."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from pytorch_lightning.utilities.data import has_len_all_ranks
from torch.utils.data import DataLoader

from anomaly_lit.runs.failures import quiet


def test_lightning_does_not_repeat_that_there_are_no_images() -> None:
    alone: Any = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda x, reduce_op: x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet()
        assert has_len_all_ranks(DataLoader([]), alone)
    assert [str(warning.message) for warning in told] == []
