"""A model quantized by optimum-quanto, with the tensors that it saves and no quanto_qmap.json beside them, without which nobody
can read them: the file is there to be refused for the right reason. quanto/make.py makes a whole model.

pip install optimum-quanto==0.2.7 transformers==5.23.0; python tests/golden/make_quanto.py
"""

from __future__ import annotations

import torch
from optimum.quanto import freeze, qint4, quantize
from store import store


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 16, bias=False))
    quantize(model, weights=qint4)
    freeze(model)
    store("quanto", model.state_dict(), {"0": model[0].weight.dequantize()}, {}, ("optimum-quanto",))


if __name__ == "__main__":
    main()
