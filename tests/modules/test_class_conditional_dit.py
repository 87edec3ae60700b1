import itertools
import json
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_diffclf import ClassConditionalDiT, DiT
from lightning_diffclf.cli import read_checkpoint
from lightning_diffclf.commands import run
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.data.imagenet import ImageNetDataModule
from lightning_diffclf.denoiser import Candidates
from lightning_diffclf.modules.conditions import Conditions, conditions
from lightning_diffclf.modules.training import StepRandom, class_sets, keyed_generator
from tests.conftest import GOLDEN
from tests.photos import autoencoder, photos
from tests.ranks import run_ranks

TINY = {
    "input_size": 8,
    "in_channels": 1,
    "num_classes": 10,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "latents": False,
}
FLOW = {"schedule": "rectified_flow", "learn_sigma": False}
V_PREDICTION = {"prediction": "v_prediction", "learn_sigma": False}


def trainer(max_steps: int, **kwargs) -> L.Trainer:
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(max_steps=max_steps, **settings | kwargs)


def test_training_loss_is_the_references(golden_dit):
    config = json.loads((GOLDEN / "dit" / "dit_golden.json").read_text())["model"]
    module = ClassConditionalDiT(**config).eval()
    module.net.load_state_dict(load_file(GOLDEN / "dit" / "dit_tiny.safetensors"))
    a = golden_dit.arrays
    losses = module.losses(a["train_x"], a["train_y"], a["t"], a["train_noise"], drop=None)
    for ours, theirs in (("mse", "train_mse"), ("vb", "train_vb"), ("loss", "train_loss")):
        torch.testing.assert_close(losses[ours], a[theirs], rtol=1e-5, atol=1e-5)


class Recording(ClassConditionalDiT):
    def losses(self, x0, labels, t, noise, drop):
        if self.training:
            self.__dict__.setdefault("drawn", []).append((t.clone(), noise.clone(), drop.clone()))
        return super().losses(x0, labels, t, noise, drop)


def test_a_resumed_run_draws_and_learns_what_it_would_have(tmp_path):
    def run(ckpt_path: Path | None = None) -> Recording:
        torch.manual_seed(0 if ckpt_path is None else 99)  # the global generator plays no role after initialisation
        module = Recording(**TINY)
        for i, p in enumerate(module.parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        fitting = trainer(6, enable_checkpointing=True, callbacks=[saving])
        fitting.fit(module, DigitsDataModule(batch_size=500), ckpt_path=ckpt_path)
        return module

    whole = run()
    resumed = run(tmp_path / "step=3.ckpt")
    for (t, noise, drop), (t2, noise2, drop2) in zip(whole.drawn[3:], resumed.drawn, strict=True):
        assert torch.equal(t, t2)
        assert torch.equal(noise, noise2)
        assert torch.equal(drop, drop2)
    assert not torch.equal(whole.drawn[0][0], whole.drawn[1][0])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_sets_have_the_own_class_and_sizes_of_every_scale():
    rows, num_classes, share = 40_000, 50, 0.5
    labels = torch.arange(rows) % num_classes
    random = StepRandom(keyed_generator(torch.device("cpu"), 7), rows, slice(None))
    members = class_sets(labels, num_classes, share, random)
    assert members.gather(1, labels[:, None]).all()
    sizes = torch.bincount(members.sum(1), minlength=num_classes + 1)[1:] / rows
    m = np.arange(1, num_classes + 1)
    expected = share * np.log1p(1 / m) / np.log(num_classes + 1) + (1 - share) * (m == 1)
    np.testing.assert_allclose(sizes, expected, atol=5 * (expected.max() / rows) ** 0.5)
    others = members.double().mean(0)  # no class is favoured
    assert (others - others.mean()).abs().max() < 5 * (0.25 / rows) ** 0.5
    assert class_sets(labels, num_classes, 0.0, random).sum() == rows
    again = StepRandom(keyed_generator(torch.device("cpu"), 7), rows, slice(1, None, 2))
    assert torch.equal(class_sets(labels[1::2], num_classes, share, again), members[1::2])


def test_without_sets_a_step_draws_what_it_always_drew():
    module = Recording(**TINY)
    trainer(2).fit(module, DigitsDataModule(batch_size=40))
    for step, (t, noise, drop) in enumerate(module.drawn):
        generator = keyed_generator(torch.device("cpu"), 0, step)
        assert torch.equal(t, torch.randint(1000, (40,), generator=generator))
        assert torch.equal(noise, torch.randn(40, 1, 8, 8, generator=generator))
        assert torch.equal(drop, torch.rand(40, generator=generator) < 0.1)


@pytest.mark.ddp
def test_ranks_draw_different_noise_and_learn_what_one_process_would():
    calls = (1, 1), (1, 2), (2, 2), (3, 1)  # devices, batches of a step
    (alone,), *others = run_ranks("fit_dit.py", *calls)
    for (devices, accumulate), ranks in zip(calls[1:], others, strict=True):
        for a, b in itertools.combinations(ranks, 2):
            for x, y in zip(a["drawn"], b["drawn"], strict=True):
                assert all(p != q for p, q in zip(x, y, strict=True))
            assert a["weight"] == b["weight"] != 0
        # the same global batch, the same noise: the loss curve of one process, but for the order of summation
        batches = [sum(rank) / devices for rank in zip(*(one["losses"] for one in ranks), strict=True)]
        steps = [sum(batches[i : i + accumulate]) / accumulate for i in range(0, len(batches), accumulate)]
        assert steps == pytest.approx(alone["losses"], rel=1e-4)
        assert ranks[0]["weight"] == pytest.approx(alone["weight"], rel=1e-3)


class Sharded(NamedTuple):
    folder: Path
    runs: dict[str, list[dict]]  # that of each rank


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Sharded:
    folder = tmp_path_factory.mktemp("sharded")
    half, other = folder / "2-6.ckpt", tmp_path_factory.mktemp("contrasted")
    calls = {
        "straight": (1, 8, folder, "compared"),
        "begun": (2, 6, folder, "compared"),
        "resumed": (2, 8, folder, "compared", half),
        "contrasted alone": (1, 6, other, "contrasted"),
        "contrasted": (2, 6, other, "contrasted"),
    }
    again = (1, 8, other, "compared", half)
    found = run_ranks("fit_fsdp.py", *calls.values(), again)
    return Sharded(folder, dict(zip([*calls, "resumed alone"], found, strict=True)))


@pytest.mark.ddp
def test_sharded_weights_and_their_average_become_what_whole_ones_would(sharded):
    straight, alone = (sharded.runs[name][0] for name in ("straight", "resumed alone"))
    begun, resumed = (sharded.runs[name] for name in ("begun", "resumed"))
    for name, count in (("losses", 2), ("validated", 1)):  # validation is with the average
        ranks = [one[name] + other[name] for one, other in zip(begun, resumed, strict=True)]
        assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(straight[name], rel=1e-4)
        assert all(len(one[name]) == count for one in resumed)
    assert all(one["share"] < 0.75 for one in begun)  # of two: some small ones are whole between steps
    whole, parts = (read_checkpoint(sharded.folder / f"{devices}-8.ckpt") for devices in (1, 2))
    assert parts["averaging_state"] == whole["averaging_state"]
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == parts[part].keys()
        for name, value in whole[part].items():
            assert (parts[part][name] - value).norm() <= 1e-4 * value.norm(), (part, name)
    average, trained = whole["state_dict"], whole["current_model_state"]
    assert any((trained[name] - value).norm() > 0.05 * value.norm() for name, value in average.items())
    # a checkpoint of sharded weights is one like any other: one process resumes from it
    assert alone["losses"] == pytest.approx(straight["losses"][6:], rel=1e-4)
    assert alone["validated"] == pytest.approx(straight["validated"][3:], rel=1e-4)


@pytest.mark.ddp
def test_sharded_weights_learn_the_same_contrast(sharded):
    (alone,), ranks = (sharded.runs[name] for name in ("contrasted alone", "contrasted"))
    for name in ("losses", "validated"):
        found = [sum(pair) / 2 for pair in zip(*(one[name] for one in ranks), strict=True)]
        assert found == pytest.approx(alone[name], rel=1e-4)
    assert alone["losses"][0] < 0.9 * alone["validated"][0]  # less 0.3 of the distance to another image's target
    assert all(one["share"] < 0.75 for one in ranks)


@pytest.mark.parametrize("settings", [{}, FLOW, V_PREDICTION])
def test_learns_something(settings):
    module = ClassConditionalDiT(**TINY, **settings, lr=1e-2, warmup_steps=5, decay="cosine")
    data = DigitsDataModule(batch_size=128)
    before = trainer(1).validate(module, data, verbose=False)[0]["val/loss"]
    fitting = trainer(40, precision="bf16-mixed")
    fitting.fit(module, data)
    after = trainer(1).validate(module, data, verbose=False)[0]["val/loss"]
    assert after < 0.8 * before
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)
    # the loss of an image is taken at noise of its own, so it does not depend on batches
    again = trainer(1).validate(module, DigitsDataModule(eval_batch_size=7), verbose=False)[0]["val/loss"]
    assert again == pytest.approx(after, rel=1e-5)


def test_checkpoints_rebuild_the_module_without_running_code(tmp_path):
    module = ClassConditionalDiT(**TINY, class_names=[f"digit {i}" for i in range(10)])
    fitting = trainer(1)
    fitting.fit(module, DigitsDataModule())
    fitting.save_checkpoint(tmp_path / "x.ckpt")
    assert "state_dict" in torch.load(tmp_path / "x.ckpt", weights_only=True)
    loaded = ClassConditionalDiT.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.candidates.names[3] == "digit 3"
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 9])
    assert torch.equal(loaded.eval().predict(x, t, y), module.eval().predict(x, t, y))


@pytest.mark.parametrize("settings", [{}, FLOW, V_PREDICTION])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_sampling_is_keyed_and_keeps_the_mode(settings, guidance_scale):
    module = ClassConditionalDiT(**TINY, **settings).train()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    five = module.sample(torch.arange(5), guidance_scale, steps=4)
    assert module.training
    assert five.shape == (5, 1, 8, 8)
    assert five.abs().max() <= 1
    torch.testing.assert_close(module.sample(torch.arange(2), guidance_scale, steps=4), five[:2])
    assert not torch.equal(module.sample(torch.arange(2), guidance_scale, steps=4, seed=1), five[:2])
    torch.testing.assert_close(module.sample(torch.arange(3, 5), guidance_scale, steps=4, ids=[3, 4]), five[3:])


def test_sampling_recovers_the_data_of_an_exact_network():
    """A network that knows the one image there is must lead every sampler to it."""
    target = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    flows = {"schedule": "rectified_flow"}, {"schedule": "sit"}
    for settings in ({"schedule": "linear"}, {"prediction": "v_prediction"}, *flows):
        module = ClassConditionalDiT(**TINY, **settings, learn_sigma=False)
        scale = getattr(module.schedule, "time_scale", None)

        def exact(x_t, t, y, module=module, scale=scale):
            time = t / scale if scale else t.long()
            x0 = target.expand_as(x_t)
            alpha, sigma = (v.view(-1, 1, 1, 1) for v in (module.schedule.alpha(time), module.schedule.sigma(time)))
            return module.schedule.target(x0, (x_t - alpha * x0) / sigma, time)

        module.net.forward = exact
        images = module.sample(torch.zeros(3, dtype=torch.int64), steps=20)
        torch.testing.assert_close(images, target.expand(3, 1, 8, 8), rtol=0, atol=0.02)


def test_published_sizes_by_name():
    module = ClassConditionalDiT(model="DiT-S/8", input_size=[16, 32])
    assert isinstance(module.net, DiT)
    assert module.net(torch.zeros(1, 4, 16, 32), torch.tensor([0]), torch.tensor([0])).shape == (1, 8, 16, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "rectified_flow"}, "learn_sigma: .* found 'velocity'"),
        ({"schedule": "parabolic"}, "schedule: 'parabolic', expected one of"),
        ({"prediction": "velocity", "learn_sigma": False}, "prediction is 'velocity'"),
        ({"class_names": ["a"]}, "class_names: 1 names for num_classes = 10"),
        ({"lr": 0.0}, "lr: 0.0"),
        ({"model": "DiT-H/2"}, "DiT-H/2"),
        ({"num_heads": 3}, "hidden_size: 16"),
        ({"class_sets": 1.5}, r"class_sets: 1.5, expected a share in \[0, 1\]"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassConditionalDiT(**TINY | settings)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"shape \(2, 3, 8, 8\), expected \(B, 1, 8, 8\)"),
        (torch.full((2, 1, 8, 8), 255.0), r"values in \[255, 255\], expected pixels in \[-1, 1\]"),
        (torch.full((2, 1, 8, 8), torch.nan), "values in"),
    ],
)
def test_images_that_do_not_fit(images, message):
    with pytest.raises(ValueError, match=message):
        ClassConditionalDiT(**TINY).encode(images)


def test_batches_that_do_not_fit():
    module = ClassConditionalDiT(**TINY)
    for batch, message in (
        ((torch.zeros(2, 1, 8, 8), torch.tensor([0, 10])), "labels: 0 … 10, expected 0 … 9"),
        (torch.zeros(2, 1, 8, 8), "no labels"),
        ((torch.ones(2, 1, 8, 8) * 16, torch.tensor([0, 1])), "expected pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(1).fit(module, DataLoader([batch], batch_size=None))
    with pytest.raises(ValueError, match="decay: 'cosine' needs an end"):
        trainer(-1, max_epochs=-1).fit(ClassConditionalDiT(**TINY, decay="cosine"), DigitsDataModule())
    with pytest.raises(ValueError, match="without label dropout"):
        ClassConditionalDiT(**TINY, class_dropout_prob=0.0).sample(torch.tensor([1]), guidance_scale=2.0)
    with pytest.raises(ValueError, match="steps: 0"):
        module.sample(torch.tensor([1]), steps=0)


def test_generators_are_keyed():
    def draw(*key: int) -> float:
        return torch.rand((), generator=keyed_generator(torch.device("cpu"), *key)).item()

    assert draw(0, 1, 2, 3) == draw(0, 1, 2, 3)
    assert len({draw(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)}) == 16
    assert draw(1, 11) != draw(11, 1)


# --- latents and pixels --------------------------------------------------------------------------------------------


LATENT = {"input_size": 8, "in_channels": 4, "num_classes": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}


def test_pixels_become_latents(tmp_path):
    vae = autoencoder(tmp_path / "vae")
    module = ClassConditionalDiT(**LATENT, vae=str(tmp_path / "vae"))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(module.encode(images), (posterior.mean - 0.1) * 0.5)
    latents = torch.randn(2, 4, 8, 8)
    assert module.encode(latents) is latents  # made beforehand
    noise = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(module._to_x0(images, noise), (posterior.mean + posterior.std * noise - 0.1) * 0.5)
    assert len(list(module.parameters())) == len(list(module.net.parameters()))  # not a part of it
    for wrong, message in (
        (images * 2, r"expected pixels in \[-1, 1\]"),
        (images[:, :, :60], "multiples of 8"),
        (images[:, :, :32, :32], r"expected \(B, 4, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            module.encode(wrong)
    with pytest.raises(ValueError, match="vae: none given"):
        ClassConditionalDiT(**LATENT).encode(images)
    with pytest.raises(ValueError, match="works on pixels"):
        ClassConditionalDiT(**TINY, vae="some/vae")


def test_training_on_pixels_is_keyed(tmp_path):
    autoencoder(tmp_path / "vae")

    def drawn(accumulate, class_sets):
        torch.manual_seed(0)
        module = ClassConditionalDiT(**LATENT, vae=str(tmp_path / "vae"), class_sets=class_sets)
        seen = []
        to_x0, losses = module._to_x0, module.losses

        def encoding(images, noise=None):
            seen.append([noise])
            return to_x0(images, noise)

        def recording(x0, labels, t, noise, drop):
            seen[-1] += [labels, t, noise, drop]
            return losses(x0, labels, t, noise, drop)

        module._to_x0, module.losses = encoding, recording
        images = torch.linspace(-1, 1, 4 * 3 * 64 * 64).view(4, 3, 64, 64)
        batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.chunk(accumulate)]
        trainer(1, accumulate_grad_batches=accumulate).fit(module, DataLoader(batches, batch_size=None))
        return [torch.cat(parts) for parts in zip(*seen, strict=True)]

    for share in (0.0, 0.5):
        for one, other in zip(drawn(1, share), drawn(2, share), strict=True):
            assert len(one) == 4
            assert torch.equal(one, other)
    plain, sets = drawn(1, 0.0), drawn(1, 0.5)
    labels, members = plain.pop(1), sets.pop(1)
    assert (labels.dtype, members.dtype) == (torch.int64, torch.bool)
    for one, other in zip(plain, sets, strict=True):  # sets are drawn last: nothing else changes
        assert torch.equal(one, other)


def test_data_must_fit_the_network(tmp_path):
    photos(tmp_path / "photos", each=4, size=(70, 66))
    autoencoder(tmp_path / "vae")
    latents, vae = str(tmp_path / "latents"), str(tmp_path / "vae")
    run(
        "encode",
        ["--data", str(tmp_path / "photos"), "--out", latents, "--size", "64", "--vae", vae, "--accelerator", "cpu"],
    )

    def fit(settings, data):
        data = ImageNetDataModule(**{"train": latents, "val": latents, "size": 64, "num_workers": 0} | data)
        trainer(1, limit_val_batches=0).fit(ClassConditionalDiT(**LATENT | settings), data)

    fit({"vae": vae}, {"batch_size": 4})
    for settings, data, message in (
        ({"num_classes": 1000}, {}, "num_classes: 1000, but the training data have 3 classes"),
        ({"input_size": 16}, {}, r"has \(4, 8, 8\), the network takes \(4, 16, 16\)"),
        ({"vae": "other/vae"}, {}, r"was made with .*, expected 'other/vae' \(model.vae\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(settings, {"batch_size": 4} | data)


def test_checkpointing_and_compile_change_nothing(tmp_path):
    def weights(**settings):
        torch.manual_seed(0)
        module = ClassConditionalDiT(**TINY | {"depth": 2, "class_sets": 0.5}, **settings)
        trainer(3).fit(module, DigitsDataModule(batch_size=64))
        return [p.detach().clone() for p in module.parameters()], module

    plain, _ = weights()
    again, _ = weights(checkpointing=True)
    compiled, module = weights(compile=True)
    for a, b, c in zip(plain, again, compiled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-5)
    assert not any("_orig_mod" in name for name in module.state_dict())


def test_class_embeddings_predict_as_classes_do():
    torch.manual_seed(0)
    module = ClassConditionalDiT(input_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=5).eval()
    for parameter in module.net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module._conditions = (lambda: None), Conditions(Candidates(["a", "b", "c"], [0, 1, 1]), torch.tensor([4, 1, 2]))
    candidate, x_t, t = torch.tensor([0, 2, 1]), torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 999])
    conditions = module.conditions(candidate)
    assert torch.equal(conditions, module.net.y_embedder.embedding_table.weight[[4, 2, 1]])
    output = module.predict_from(x_t, t, conditions)
    torch.testing.assert_close(output, module.predict(x_t, t, candidate), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(output.square().sum(), conditions)
    assert gradient.any(1).all()
    drop = torch.tensor([False, True, False])  # the null label's embedding then takes a given one's place
    dropped = module.net(x_t, t, conditions, drop=drop)
    torch.testing.assert_close(dropped, module.net(x_t, t, torch.tensor([4, 2, 1]), drop=drop))
    with pytest.raises(ValueError, match=r"expected torch.int64 \(3,\), or embeddings \(3, 8\)"):
        module.net(x_t, t, conditions[:, :7])


def test_none_of_these_is_the_null_label():
    module = ClassConditionalDiT(**TINY, none_of_these=True).eval()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # the last layer begins at zero
    classes = module.hparams["num_classes"]
    assert module.candidates.names[-1] == "none of these"
    assert len(module.candidates) == module.candidates.num_classes == classes + 1
    x_t = torch.randn(2, *module.image_shape, generator=torch.Generator().manual_seed(0))
    t = module.schedule.network_time(module.schedule.timesteps(2))
    found = module.predict(x_t, t, torch.tensor([classes, 1]))
    dropped = module.net(x_t, t, torch.tensor([0, 1]), drop=torch.tensor([True, False]))
    torch.testing.assert_close(found, dropped)
    with pytest.raises(ValueError, match=r"none_of_these: the network has no null label, expected class_dropout_prob"):
        ClassConditionalDiT(**TINY | {"class_dropout_prob": 0.0}, none_of_these=True)


class Grouped:
    """Data of two classes, which are made up of three of the network's."""

    class_names = ("cat", "dog")
    network_classes = ((4,), (0, 2))


def test_none_of_these_is_a_class_beside_those_of_the_data():
    found = conditions(5, None, Grouped(), null=True)
    assert found.candidates.names == ("cat", "dog (0)", "dog (2)", "none of these")
    assert found.candidates.classes == (0, 1, 1, 2)
    assert list(found.candidates.class_names) == ["cat", "dog", "none of these"]
    assert found.rows.tolist() == [4, 0, 2, 5]
