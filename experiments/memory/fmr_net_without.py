"""`anomaly-train` with FMR-Net's memory switched off: nothing is replaced, nothing rearranged.

The gate of the memory stays shut, so the decoder gets the encoder's map and its laterals as they
are: an auto-encoder with skip connections that learns to restore synthetic defects.

    python experiments/memory/fmr_net_without.py method=fmr_net_small ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_lit.commands.train import main
from anomaly_lit.methods.fmr_net.network import ContrastiveMemory, Recall

recalled = ContrastiveMemory.forward


def shut(memory: ContrastiveMemory, map_: Tensor) -> Recall:
    recall = recalled(memory, map_)
    return recall._replace(out=map_, gate=torch.zeros_like(recall.gate))


if __name__ == "__main__":
    ContrastiveMemory.forward = shut  # type: ignore[method-assign]
    main()
