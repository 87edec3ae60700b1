"""Attacks and certificates of a test set: in folders that resume, and equal to what the methods themselves find."""

import dataclasses
import json

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diffclf import Candidates, DiffusionClassifier, DiffusionLogits
from lightning_diffclf.callbacks.attack import AttackTrial
from lightning_diffclf.callbacks.certification import CertificationTrial
from lightning_diffclf.callbacks.trial import TrialCallback
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.classifier.attack import APGD, margin_loss
from lightning_diffclf.classifier.smoothing import Denoised, certify
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import merge
from lightning_diffclf.results.stored import read_table
from lightning_diffclf.results.trials import to_table, write_metrics
from tests.gaussians import CLASSES, SHAPE, Gaussians, Samples

COUNT = 11


class Pixels(Samples):
    """As pixels are, in [-1, 1]."""

    def __init__(self, count: int = COUNT, labelled: bool = True) -> None:
        super().__init__(count, labelled)
        self.images = self.images.clamp(-1, 1)


class Planes(L.LightningModule):
    """Two classes by linear logits, whose worst case is known."""

    def __init__(self) -> None:
        super().__init__()
        self.candidates = Candidates(["a", "b"], [4, 2], list("vwxyz"))  # columns are not classes
        self.weight = nn.Parameter(torch.randn(9, 2, generator=torch.Generator().manual_seed(3)))

    def logits(self, images):
        return images.flatten(1) @ self.weight

    def test_step(self, batch, batch_idx): ...


def tried(out, trial, module=None, data=None, batch_size=4, **settings):
    """Rows and numbers of a trial, gone on with where ``out`` has some already."""
    callback = TrialCallback(trial, Recipe(), str(out), **settings)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        inference_mode=False,
        callbacks=[callback],
    )
    trainer.test(module or Gaussians(), DataLoader(data or Pixels(), batch_size=batch_size), verbose=False)
    report = json.loads((callback.folder / "metrics.json").read_text())
    assert report["metrics"] == callback.metrics
    return read_table(callback.folder).to_pydict(), report


ATTACK = AttackTrial(0.05, steps=6, restarts=2, draws=3, batch_size=4)


class Interrupted(Exception):
    pass


class Interrupts(AttackTrial):
    """Leaves in the middle of a group."""

    def rows(self, *given):
        for number, row in enumerate(super().rows(*given)):
            if row.id == "106":
                raise Interrupted(number)
            yield row


def same(found, expected):
    for name in expected:
        if name in ("margin_before", "margin_after", "distance", "radius"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
        elif name not in ("seconds", "queries"):
            assert found[name] == expected[name], name


def test_an_attack_depends_on_neither_batches_nor_interruptions(tmp_path, capsys):
    whole, report = tried(tmp_path / "whole", ATTACK)
    assert whole["id"] == [str(100 + i) for i in range(COUNT)]
    other, _ = tried(tmp_path / "other", AttackTrial(0.05, steps=6, restarts=2, draws=3, batch_size=3), batch_size=5)
    same(other, whole)
    with pytest.raises(Interrupted):
        tried(tmp_path / "twice", Interrupts(0.05, steps=6, restarts=2, draws=3, batch_size=4))
    assert read_table(tmp_path / "twice").num_rows == 6  # two of the group that was left are not lost
    limited, _ = tried(tmp_path / "twice", ATTACK, limit=9)
    assert len(limited["id"]) == 9
    found, again = tried(tmp_path / "twice", ATTACK)
    assert "twice: 9 images are finished" in capsys.readouterr().out
    same(found, whole)
    assert again["metrics"]["robust_accuracy"] == report["metrics"]["robust_accuracy"]
    assert again["settings"]["attack"]["eps"] == 0.05
    assert again["settings"]["recipe"]["draws"] == 3
    with pytest.raises(UserError, match=r"attack.eps: 0.05 there, 0.1 here.*give another folder"):
        tried(tmp_path / "twice", AttackTrial(0.1, steps=6, restarts=2, draws=3, batch_size=4))
    tried(tmp_path / "twice", AttackTrial(0.1, steps=1, draws=1), next_free=True, limit=2)
    assert read_table(tmp_path / "twice-2").num_rows == 2


@pytest.mark.parametrize(("norm", "eps", "dual"), [("linf", 0.04, 1), ("l2", 0.1, 2)])
def test_of_linear_logits_it_is_the_worst_case(norm, eps, dual, tmp_path):
    """In closed form: the margin falls by eps times the dual norm of the difference of two planes."""
    generator = torch.Generator().manual_seed(0)
    images, module = 0.6 * torch.rand(COUNT, *SHAPE, generator=generator) - 0.3, Planes()
    column_B = module.logits(images).argmax(1)
    labels = torch.tensor([4, 2])[column_B].tolist()
    data = [{"image": x, "label": y, "id": i} for i, (x, y) in enumerate(zip(images, labels, strict=True))]
    rows, report = tried(tmp_path / "out", AttackTrial(eps, norm, steps=30), module, data)
    difference = (module.weight[:, 0] - module.weight[:, 1]).detach()
    lead_B = (images.flatten(1) @ difference).abs() - 2 * eps * difference.norm(dual)  # of images in [-1, 1]: twice
    assert rows["margin_after"] == pytest.approx(lead_B.tolist(), abs=0.01)
    assert rows["clean_S"] == [[label] for label in labels]
    assert [one != [label] for one, label in zip(rows["attacked_S"], labels, strict=True)] == (lead_B < 0).tolist()
    assert 0 < report["metrics"]["robust_accuracy"] < 1 == report["metrics"]["accuracy"]
    assert module.weight.requires_grad  # again


def test_each_seed_is_attacked_and_judges_by_itself(tmp_path):
    trial = AttackTrial(0.05, steps=4, seeds=3, draws=2, batch_size=COUNT)
    rows, report = tried(tmp_path / "out", trial, batch_size=COUNT)
    data = Pixels()
    images = data.images / 2 + 0.5
    for seed, key in enumerate(("every image", "every image, 1", "every image, 2")):
        network = DiffusionLogits(DiffusionClassifier(Gaussians().requires_grad_(False), draws=2), key)
        clean = network(images).argmax(1)
        assert [one[seed] for one in rows["clean_S"]] == clean.tolist()
        right = clean == data.labels
        found = APGD(0.05, steps=4)(network, images[right], data.labels[right])
        attacked = np.array([one[seed] for one in rows["attacked_S"]])[right.numpy()]
        assert ((attacked == data.labels[right].numpy()) == found.right.numpy()).all()
    assert report["metrics"]["seeds"] == 3
    assert report["metrics"]["robust_accuracy"] <= report["metrics"]["robust_accuracy_of_a_seed"]


def test_fresh_draws_are_judged_by_others_than_the_attack_saw(tmp_path):
    trial = AttackTrial(0.05, steps=3, seeds=2, draws=2, randomness="fresh", eot=2)
    rows, report = tried(tmp_path / "a", trial)
    same(tried(tmp_path / "b", trial, batch_size=3)[0], rows)  # calls are counted anew for each group
    network = DiffusionLogits(DiffusionClassifier(Gaussians(), draws=2), "judge 1")
    images = Pixels().images / 2 + 0.5
    assert [one[1] for one in rows["clean_S"]] == network(images).argmax(1).tolist()
    fresh = DiffusionLogits(DiffusionClassifier(Gaussians(), draws=2), fresh=True)
    calls = [fresh(images) for _ in range(2)]
    assert not torch.equal(*calls)
    assert torch.equal(
        calls[1], DiffusionClassifier(Gaussians(), draws=2).logits(images * 2 - 1, "every image, call 1")
    )
    assert report["settings"]["attack"] | {"eot": 2, "randomness": "fresh"} == report["settings"]["attack"]


class Linear(L.LightningModule):
    """As many classes as AutoAttack needs, on images that Square Attack can take."""

    def __init__(self) -> None:
        super().__init__()
        self.candidates = Candidates(list("abcd"))
        self.weight = nn.Parameter(torch.randn(25, 4, generator=torch.Generator().manual_seed(0)))

    def logits(self, images):
        return images.flatten(1) @ self.weight

    def test_step(self, batch, batch_idx): ...


def test_auto_attack_is_of_whole_groups(tmp_path):
    """What it finds of an image depends on who else is there: a group that was left is attacked as a whole again."""
    pytest.importorskip("pyautoattack")
    generator = torch.Generator().manual_seed(4)
    images, module = torch.rand(4, 1, 5, 5, generator=generator) * 2 - 1, Linear()
    labels = module.logits(images).argmax(1)
    data = TensorDataset(images, labels, 104 + torch.arange(4))
    settings = {"eps": 1.0, "norm": "l2", "auto": True, "batch_size": 3}  # an image that resists takes seconds
    whole, report = tried(tmp_path / "whole", AttackTrial(**settings), module, data)
    with pytest.raises(Interrupted):
        tried(tmp_path / "twice", Interrupts(**settings), module, data)
    assert read_table(tmp_path / "twice")["id"].to_pylist() == ["104", "105"]
    found, _ = tried(tmp_path / "twice", AttackTrial(**settings), module, data)
    assert found["margin_after"] == whole["margin_after"]
    assert max(whole["margin_after"]) < 0 < min(whole["margin_before"])
    assert max(whole["distance"]) == pytest.approx(1, abs=1e-3)
    assert report["settings"]["groups"] == [3, 4, 1]
    assert "steps" not in report["settings"]["attack"]
    with pytest.raises(UserError, match=r"groups: .* there, .* here"):
        tried(tmp_path / "twice", AttackTrial(**settings | {"batch_size": 2}), module, data)


def test_certificates_are_those_of_the_method(tmp_path):
    trial = CertificationTrial(0.25, n0=5, n=20, alpha=0.05, draws=2, batch_size=8)
    rows, report = tried(tmp_path / "a", trial)
    same(tried(tmp_path / "b", trial, batch_size=3)[0], rows)
    module, data = Gaussians(), Pixels()
    base = Denoised(module, DiffusionLogits(DiffusionClassifier(module, draws=2)), 0.25)
    for i in (0, COUNT - 1):
        found = certify(base, data.images[i] / 2 + 0.5, 0.25, n0=5, n=20, alpha=0.05, image_id=100 + i)
        assert (rows["prediction"][i], rows["votes"][i]) == (found.prediction, found.votes)
        assert rows["radius"][i] == pytest.approx(found.radius)
    assert [row["radius"] for row in report["metrics"]["certified"]] == [0.0, 0.1, 0.25]  # 0.27 at most
    planes, _ = tried(tmp_path / "c", CertificationTrial(0.1, n0=5, n=20), Planes(), Four())
    assert set(planes["prediction"]) <= {None, 2, 4}


@pytest.mark.parametrize(("kind", "together"), [("attack", 2), ("attack", 3), ("certification", 4)])
def test_parts_are_joined_to_what_one_run_finds(kind, together, tmp_path):
    """Groups stay as they are, so that not even rounding differs; a part may have no image."""
    if kind == "attack":
        trial = AttackTrial(0.05, steps=2, draws=1, batch_size=together)
    else:
        trial = CertificationTrial(0.25, n0=3, n=9, alpha=0.1, draws=1, batch_size=together)
    whole, report = tried(tmp_path / "whole", trial, batch_size=4)
    parts = [tmp_path / str(number) for number in range(1, 9)]
    found = [tried(out, trial, batch_size=4, part=f"{out.name}/8") for out in parts]
    sizes = [len(rows["id"]) for rows, _ in found]
    assert sum(sizes) == COUNT
    assert 0 in sizes
    assert found[sizes.index(0)][1]["metrics"] == {"images": 0}
    assert merge(parts, tmp_path / "joined") == COUNT
    joined = read_table(tmp_path / "joined").to_pydict()
    assert {name: joined[name] for name in joined if name != "seconds"} == {
        name: whole[name] for name in whole if name != "seconds"
    }
    settings = Settings.read(tmp_path / "joined")
    metrics = write_metrics(tmp_path / "joined", settings)
    assert metrics | {"seconds": 0} == report["metrics"] | {"seconds": 0}
    assert settings.info["part"] is None
    assert to_table(settings, metrics).title == to_table(settings, {"images": 0}).title.removesuffix(": no image")


class Four(Pixels):
    """Of the classes of Planes."""

    def __init__(self) -> None:
        super().__init__(4)
        self.labels = torch.tensor([4, 2, 2, 2])


def test_every_field_is_of_the_identity_or_cannot_matter():
    """Draws are of the recipe, and so in the identity of the run; groups are beside it where they matter."""
    table = {
        AttackTrial(0.1, randomness="fresh"): (
            {"eps": 0.2, "norm": "l2", "steps": 7, "restarts": 2, "seeds": 2, "eot": 2, "auto": True, "seed": 1}
            | {"randomness": "fixed"},
            {"draws", "batch_size"},
        ),
        CertificationTrial(0.1): (
            {"sigma": 0.2, "n0": 7, "n": 70, "alpha": 0.1, "seed": 1},
            {"draws", "batch_size", "radii"},  # radii are of the table
        ),
    }
    for trial, (others, harmless) in table.items():
        assert {field.name for field in dataclasses.fields(trial)} == others.keys() | harmless
        identities = [str(dataclasses.replace(trial, **{name: value}).identity()) for name, value in others.items()]
        assert len({str(trial.identity()), *identities}) == 1 + len(others)


def test_what_cannot_be_tried_is_said(tmp_path):
    small = AttackTrial(0.05, steps=1, draws=1)

    class Latents(Pixels):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": 3 * torch.ones(SHAPE)}

    class Foreign(Pixels):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": CLASSES}

    class Detached(Gaussians):
        def predict(self, x_t, t, candidate):
            return super().predict(x_t.detach(), t, candidate)

    for number, (settings, message) in enumerate(
        (
            ({"data": Latents()}, r"images: values in \[3, 3\], expected pixels in \[-1, 1\]"),
            ({"data": Foreign()}, f"label: {CLASSES} of image 100, expected a class in play"),
            ({"data": Pixels(labelled=False)}, "attack: images with no labels"),
            ({"module": Detached()}, "no gradient path from the images through denoiser.predict"),
            ({"module": Planes()}, "draws: 1, but Planes adds no noise"),
            ({"limit": 0}, "limit: 0, expected at least 1"),
        )
    ):
        with pytest.raises(UserError, match=message):
            tried(tmp_path / str(number), small, **settings)
    for trial in (AttackTrial(0.05, seeds=2), AttackTrial(0.05, randomness="fresh")):
        with pytest.raises(UserError, match="Planes adds no noise; expected fixed and 1"):
            tried(tmp_path / "out", trial, Planes())
    for settings, message in (
        ({"eps": 8}, r"eps: 8, expected a positive radius in units of images in \[0, 1\]"),
        ({"eps": 0.1, "eot": 3}, "eot: 3, expected it with fresh draws"),
        ({"eps": 0.1, "seeds": 0}, "seeds: 0, expected at least 1"),
        ({"eps": 0.1, "batch_size": 0}, "batch_size: 0, expected at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            AttackTrial(**settings)
    for settings, message in (
        ({"sigma": 64}, "sigma: 64, expected a standard deviation above 0 and up to 2"),
        ({"sigma": 0.2, "alpha": 1}, "alpha: 1, expected a probability"),
        ({"sigma": 0.2, "radii": (-1,)}, r"radii: \[-1\], expected distances of 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            CertificationTrial(**settings)
    with pytest.raises(UserError, match="inference_mode: true, but gradients are needed"):
        L.Trainer(accelerator="cpu", logger=False, callbacks=[TrialCallback(small, Recipe(), "x")]).test(
            Gaussians(), DataLoader(Pixels())
        )
    labels = torch.zeros(1, dtype=torch.int64)
    assert float(margin_loss(torch.tensor([[1.0, 3.0]]), labels)) == 2.0
