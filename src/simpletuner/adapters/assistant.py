"""The assistant adapter of a distilled model: there while training, gone while sampling and in every saved file.

A model distilled to few steps loses that ability when it is trained on plain images. An assistant LoRA that already
holds this loss is active, frozen, during training, so that the trained adapter does not learn it; without the
assistant the trained adapter works on the distilled model as it is.

Live, it is an adapter beside the trained one, of strength s in training and 0 in images. Merged, it is added s times to
the weights before they take their number format, and subtracted again in images, so that a step costs nothing for it.
Let Q be the format's rounding and D the assistant's change of a weight W. Merged, images are made with
Q(W + s D) - s D = W + e, where e is the rounding error of Q at W + s D: an error such as every weight of the format
has, half a step of its row or group at most, and nothing of the assistant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simpletuner.adapters.files import LoraFile
from simpletuner.adapters.frozen import attach_frozen
from simpletuner.adapters.lora import ADAPTER_NAME, LoraReport, activate_, set_scale

ASSISTANT_NAME = "assistant"
OPTION = "/assistant_lora_path"


def attach_assistant(model: nn.Module, assistant: LoraFile, *, dtype: torch.dtype) -> LoraReport:
    """Add the assistant, frozen. Call it before `apply_lora` of the trained adapter, `activate_with_assistant_` after.

    `assistant` comes from `load_fitting`.
    """
    _, report = attach_frozen(model, assistant, dtype=dtype, adapter_name=ASSISTANT_NAME, option=OPTION)
    return report


def activate_with_assistant_(model: nn.Module, *, strength: float) -> None:
    """Let the trained adapter and the assistant act together, the latter `strength` times."""
    activate_(model, (ASSISTANT_NAME, ADAPTER_NAME))
    set_scale(model, strength, ASSISTANT_NAME)


def factors(assistant: LoraFile, *, strength: float) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Module -> (down, up) whose product up @ down is `strength` times the assistant's change of its weight."""
    return {
        module: (
            assistant.tensors[f"{module}.lora_A.weight"],
            assistant.tensors[f"{module}.lora_B.weight"].float() * (scale * strength),
        )
        for module, scale in assistant.scales.items()
    }
