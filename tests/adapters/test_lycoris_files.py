"""Files of the LyCORIS library mean to us what they mean to it: scales, Kronecker products and magnitudes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from simpletuner.adapters.formats.read import parse_adapter
from simpletuner.adapters.formats.weights import merge_

pytest.importorskip("lycoris")
pytestmark = pytest.mark.slow  # the library's import

ROWS, COLUMNS = 24, 36
CASES = {
    "lora": ("locon", {"lora_dim": 3, "alpha": 2.0}),
    "dora": ("locon", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "loha": ("loha", {"lora_dim": 3, "alpha": 2.0}),
    "dora of loha": ("loha", {"lora_dim": 3, "alpha": 6.0, "weight_decompose": True}),
    "lokr": ("lokr", {"lora_dim": 2, "alpha": 3.0, "factor": 4}),
    "lokr, both in two": ("lokr", {"lora_dim": 1, "alpha": 3.0, "factor": -1, "decompose_both": True}),
    "lokr, full": ("lokr", {"lora_dim": 10000, "alpha": 1.0, "factor": 4, "full_matrix": True}),
    "dora of lokr": ("lokr", {"lora_dim": 2, "alpha": 3.0, "factor": 4, "weight_decompose": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_files_update_is_what_the_library_computes(case):
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    algorithm, options = CASES[case]
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    weight = linear.weight.detach().clone()
    kinds = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
    module = kinds[algorithm]("lycoris_layers_0_attention_to_q", linear, 1.0, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    state = {f"lycoris_layers_0_attention_to_q.{key}": tensor for key, tensor in module.state_dict().items()}
    module.apply_to()
    x = torch.randn(5, COLUMNS)
    with torch.no_grad():
        theirs = linear(x)
    (adapter,) = parse_adapter(state, {}, path="a").modules.values()
    assert not torch.allclose(theirs, x @ weight.T, atol=1e-2)
    merge_(weight, adapter.delta(), adapter.magnitude)
    assert torch.allclose(x @ weight.T, theirs, rtol=1e-4, atol=1e-4)
