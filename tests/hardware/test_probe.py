from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from simpletuner.hardware.probe import cuda_capability, device_type, has_cuda, torch_built_for


def test_torch_is_looked_at_without_importing_it():
    code = (
        "import sys\nfrom simpletuner.hardware.probe import *\n"
        "print(torch_built_for(), has_cuda(), device_type('auto'), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(torch_built_for()), str(has_cuda()), device_type("auto"), "False"]


def test_the_build_of_torch_is_what_torch_says():
    assert (torch_built_for() == "cuda") == (torch.version.cuda is not None)
    assert (torch_built_for() == "hip") == (torch.version.hip is not None)


def test_cuda_is_there_when_torch_can_use_it():
    assert has_cuda() == torch.cuda.is_available()


@pytest.mark.parametrize(("requested", "found"), [("cpu", "cpu"), ("cuda:3", "cuda"), ("mps", "mps")])
def test_a_device_that_is_named_is_taken_at_its_word(requested, found):
    assert device_type(requested) == found


def test_auto_is_what_training_would_choose():
    assert device_type("auto") == ("cuda" if torch.cuda.is_available() else device_type("auto"))
    assert (device_type("auto") == "mps") == (torch.backends.mps.is_available() and not torch.cuda.is_available())


def test_the_capability_is_torchs():
    found = [
        10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    ]
    assert cuda_capability() == min(found, default=None)
