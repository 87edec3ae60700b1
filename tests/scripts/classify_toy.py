"""Every module of the method, and a DiT that classifies: how many calls that took."""

from importlib import import_module
from pkgutil import iter_modules

import torch

import lightning_diffclf.classifier
from lightning_diffclf import Candidates, DiffusionClassifier, DiT, LikelihoodRatio, NoiseSchedule

for found in iter_modules(lightning_diffclf.classifier.__path__, "lightning_diffclf.classifier."):
    import_module(found.name)


class Denoiser:
    def __init__(self):
        torch.manual_seed(0)
        self.schedule, self.candidates = NoiseSchedule.rectified_flow(), Candidates(["a", "b", "c"])
        self.net = DiT(8, 4, 1, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False).eval()
        torch.nn.init.normal_(self.net.final_layer.linear.weight)  # as initialized, it gives zeros

    def encode(self, images):
        return images

    def predict(self, x_t, t, candidate):
        return self.net(x_t, t, candidate)


with torch.no_grad():
    results = list(DiffusionClassifier(Denoiser(), draws=4, elimination=LikelihoodRatio())(torch.zeros(2, 1, 8, 8)))
print(sum(result.nfe for result in results))
