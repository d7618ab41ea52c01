"""From folders of images to batches: discovery, captions, geometry, plan, sampler, caches, loader.

`records`, `spec`, `geometry`, `discovery`, `captions`, `plan` and `sampler` do not import torch.
"""
