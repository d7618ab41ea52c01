"""A small network that names the shape in a picture, trained on drawn scenes, to judge what the demo base generates.

It sees pictures at half size, with random colour changes, noise and blur, so that only the outline counts. The demo's
subject is one class more. `python -m scripts.demo_base.classifier --out FILE` trains it and reports its accuracy.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scripts.demo_base import scenes, subject

CLASSES = (*scenes.SHAPES, "octopus")
WEIGHTS = Path(__file__).with_name("classifier.safetensors")
INPUT_PX = 64
NUM_DRAWN_PER_CLASS = 900
NUM_CHECKED_PER_CLASS = 60

# Legend: B pictures, C channels, H height, W width.


class ShapeClassifier(nn.Module):
    """Four strided convolutions and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(4, width) for width in widths[1:]])
        self.head = nn.Linear(widths[-1] * 16, len(CLASSES))

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """Logits [B, classes] of pictures in [-1, 1] at INPUT_PX."""
        x = pictures_BCHW
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def named_shapes(classifier: ShapeClassifier, pictures: Sequence[Image.Image]) -> list[str]:
    """The class that the classifier gives each picture."""
    with torch.no_grad():
        return [CLASSES[index] for index in classifier(to_input(pictures)).argmax(1).tolist()]


def to_input(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of any size -> [B, C, H, W] in [-1, 1] at INPUT_PX."""
    small = [np.asarray(p.convert("RGB").resize((INPUT_PX, INPUT_PX), Image.Resampling.BOX)) for p in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(path: Path = WEIGHTS) -> ShapeClassifier:
    """The trained classifier."""
    classifier = ShapeClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


def draw_examples(seed: int, combinations: Sequence[scenes.Combination], per_class: int) -> tuple[Tensor, Tensor]:
    """Drawn pictures [B, C, H, W] in [-1, 1] and their classes [B]."""
    rng = random.Random(seed)
    pictures, labels = [], []
    for label, name in enumerate(CLASSES):
        choices = [c for c in combinations if c.shape == name]
        for _ in range(per_class):
            if choices:
                picture = scenes.draw_scene(rng, scenes.plain_scene(rng, rng.choice(choices)))
            else:
                picture = subject.draw_subject(rng, rng.choice(subject.BACKGROUNDS))
            pictures.append(picture)
            labels.append(label)
    return to_input(pictures), torch.tensor(labels)


def train(*, steps: int = 900, batch_size: int = 64, seed: int = 0) -> tuple[ShapeClassifier, float]:
    """Train on drawn scenes; return the classifier and its accuracy on combinations that it never saw."""
    torch.manual_seed(seed)
    held_out = scenes.held_out_combinations()
    pictures, labels = draw_examples(
        seed, [c for c in scenes.all_combinations() if c not in set(held_out)], NUM_DRAWN_PER_CLASS
    )
    classifier = ShapeClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(len(pictures), (batch_size,))
        loss = F.cross_entropy(classifier(_disturbed(pictures[index])), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"classifier step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    return classifier.eval(), accuracy(classifier)


def accuracy(classifier: ShapeClassifier) -> float:
    """Share of drawn held-out scenes, and of drawn subjects, that it names right."""
    pictures, labels = draw_examples(999, scenes.held_out_combinations(), NUM_CHECKED_PER_CLASS)
    with torch.no_grad():
        return float((classifier(pictures).argmax(1) == labels).float().mean())


def _disturbed(pictures_BCHW: Tensor) -> Tensor:
    """Change colours and add noise, differently for each picture; blur and move the whole batch."""
    count = len(pictures_BCHW)
    mixed = pictures_BCHW[:, torch.randperm(3)]
    mixed = mixed * torch.empty(count, 3, 1, 1).uniform_(0.5, 1.1) + torch.empty(count, 3, 1, 1).uniform_(-0.2, 0.2)
    if float(torch.rand(())) < 0.4:
        mixed = F.avg_pool2d(F.pad(mixed, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    shift = torch.randint(-5, 6, (2,)).tolist()
    padded = F.pad(mixed, (5, 5, 5, 5), mode="replicate")
    moved = padded[..., 5 + shift[0] : 5 + shift[0] + INPUT_PX, 5 + shift[1] : 5 + shift[1] + INPUT_PX]
    return moved + torch.randn_like(moved) * torch.empty(count, 1, 1, 1).uniform_(0, 0.15)


def main() -> None:
    """Train, report and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=900)
    options = parser.parse_args()
    classifier, share = train(steps=options.steps)
    print(f"accuracy on held-out drawn scenes: {share:.4f}")
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
