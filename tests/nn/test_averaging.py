"""The moving average against its formula."""

from __future__ import annotations

import torch

from anomaly_lit.nn.averaging import MovingAverage


def test_moving_average_is_the_written_one() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = MovingAverage(network, 0.15)
    expected = network[0].weight.detach().clone()
    for count in range(4):
        network[0].weight.data.normal_()
        network(torch.randn(3, 2))
        average.update_parameters(network)
        decay = min(0.15, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * network[0].weight.detach()
    torch.testing.assert_close(average.module[0].weight, expected)
    assert average.module[1].num_batches_tracked == 4
    assert not average.module[1].running_mean.equal(torch.zeros(2))
