"""Computes the golden values with the authors' own code, which is not part of this repository.

Check out the repository that `<method>.json` names, at the commit it names, and run:

    python tests/golden/make.py uniad UNIAD
    python tests/golden/make.py onenip ONENIP
    python tests/golden/make.py ami_net AMI_NET
    python tests/golden/make.py dsr DSR
    python tests/golden/make.py fastflow FASTFLOW FREIA

The authors' modules need einops, tabulate and torchvision besides our requirements. They run on the
CPU in float64. Calls that would need a GPU, a download or a removed name of NumPy are replaced.
"""

from __future__ import annotations

import importlib
import json
import re
import sys

import numpy as np
import torch
from rule import FOLDER, TOLERANCE


def main() -> None:
    """Writes one file."""
    method, *checkouts = sys.argv[1:]
    sys.path[:0] = checkouts
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign]
    np.float = float  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    result = importlib.import_module(f"of_{method}").cases()
    about = {
        "weights and inputs": "by the rule of tests/golden/rule.py, from names and shapes",
        "computed": f"by tests/golden/make.py in float64 on a CPU, torch {torch.__version__}",
        "tolerance": TOLERANCE,
    }
    cases = result.pop("cases")
    text = json.dumps({**result, **about, "cases": cases}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    file = FOLDER / f"{method}.json"
    file.write_text(text + "\n")
    print(f"{file}: {len(text)} bytes")


if __name__ == "__main__":
    main()
