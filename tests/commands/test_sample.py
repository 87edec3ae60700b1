import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_diffclf import ClassConditionalDiT, PublishedNetwork
from lightning_diffclf.commands import run
from lightning_diffclf.commands.sample import labels_of
from lightning_diffclf.data.public_sets import PUBLIC_SETS, PublicSet
from lightning_diffclf.models.export import to_diffusers
from lightning_diffclf.models.published import config_of
from lightning_diffclf.modules.checkpoints import network_of
from lightning_diffclf.modules.conditions import chosen_classes
from lightning_diffclf.sampling import initial_noise
from tests.conftest import GOLDEN
from tests.models import published_twins as twins
from tests.photos import autoencoder
from tests.ranks import run_ranks


def checkpoint(folder, **settings):
    """A checkpoint of random weights, in Lightning's form."""
    tiny = {"hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 4, "input_size": 8}
    module = ClassConditionalDiT(**tiny | settings)
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(saved | {"pytorch-lightning_version": "2.6.6"}, folder / "last.ckpt")
    return module


@pytest.fixture
def digits(tmp_path):
    return checkpoint(tmp_path, in_channels=1, latents=False, class_names=["zero", "one", "two", "three"])


def sample(tmp_path, out="out", **settings):
    settings = {"ckpt": tmp_path / "last.ckpt", "steps": 3, "per_class": 3, "accelerator": "cpu"} | settings
    run("sample", [f"--out={tmp_path / out}", *(f"--{name}={value}" for name, value in settings.items())])
    return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in (tmp_path / out).glob("*/*.png")}


def test_a_folder_of_images(digits, tmp_path, capsys):
    files = sample(tmp_path, classes="one,3", guidance_scale=2.0)
    assert sorted(files) == [f"{c:04d}/{number:05d}.png" for c in (1, 3) for number in range(3)]
    assert "6 images of 2 classes" in capsys.readouterr().out
    expected = digits.sample(torch.tensor([3]), 2.0, 3, ids=["3/1"])[0, 0]
    found = np.asarray(Image.open(tmp_path / "out" / "0003" / "00001.png"))
    assert found.shape == (8, 8)  # grey
    np.testing.assert_allclose(found / 127.5 - 1, expected.numpy(), atol=0.005)


def test_images_depend_on_seed_class_and_number_only(digits, tmp_path):
    one = sample(tmp_path, "one", batch_size=100)
    assert sample(tmp_path, "two", batch_size=2) == one
    few = sample(tmp_path, "few", classes="2", per_class=2)
    assert few == {name: one[name] for name in few}
    other = sample(tmp_path, "other", seed=1)
    assert all(other[name] != one[name] for name in one)


def test_it_goes_on_where_it_was_stopped(digits, tmp_path):
    whole = sample(tmp_path)
    kept = tmp_path / "out" / "0000" / "00000.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "out" / "0002" / "00001.png").unlink()
    (tmp_path / "out" / "0002" / "00001.tmp").write_bytes(b"half")
    assert sample(tmp_path) == whole
    assert kept.stat().st_mtime_ns == before
    more = sample(tmp_path, per_class=4)
    assert {name: more[name] for name in whole} == whole
    with pytest.raises(ValueError, match=r"holds other samples \(steps: 3 there, 4 here\)"):
        sample(tmp_path, steps=4)
    moved = (tmp_path / "last.ckpt").rename(tmp_path / "moved.ckpt")
    assert sample(tmp_path, ckpt=moved, per_class=4) == more
    checkpoint(tmp_path, in_channels=1, latents=False, seed=1, learn_sigma=False)
    with pytest.raises(ValueError, match=r"holds other samples \(weights: '.*' there, '.*' here\)"):
        sample(tmp_path, per_class=4)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="is not empty"):
        sample(tmp_path, "letters")


def test_a_command_that_failed_is_not_gone_on_with(digits, tmp_path):
    with pytest.raises(ValueError, match="steps: 0, expected 1 … 1000"):
        sample(tmp_path, steps=0)
    assert len(sample(tmp_path)) == 12


@pytest.mark.ddp
def test_processes_share_the_work(digits, tmp_path):
    alone = sample(tmp_path, "alone", per_class=3)
    shutil.copytree(tmp_path / "alone", tmp_path / "both")
    for name in sorted(alone)[1:]:
        (tmp_path / "both" / name).unlink()
    flags = [f"--ckpt={tmp_path / 'last.ckpt'}", f"--out={tmp_path / 'both'}", "--steps=3", "--per_class=3"]
    [said] = run_ranks("command.py", (2, "sample", *flags, "--accelerator=cpu", "--devices=2"))
    both = {str(p.relative_to(tmp_path / "both")): p.read_bytes() for p in (tmp_path / "both").glob("*/*.png")}
    assert both == alone
    assert sum("12 images of 4 classes" in text for text in said) == 1


def shown(folder, c, number=0):
    return (
        torch.from_numpy(np.array(Image.open(folder / f"{c:04d}" / f"{number:05d}.png"))).permute(2, 0, 1) / 127.5 - 1
    )


def test_a_lightning_dit_is_sampled_along_its_flow_and_decoded(tmp_path):
    """Against the loop written out: velocities from noise at 0 to data at 1, guided away from the null label."""
    w = twins.transformer(classes=3, side=4, rms=True, swiglu=True, rope=True)
    save_file(w, tmp_path / "w.safetensors")
    torch.save(twins.ldm(), tmp_path / "vae.pt")
    how = {"ckpt": tmp_path / "w.safetensors", "vae": tmp_path / "vae.pt", "steps": 2, "per_class": 1, "classes": 1}
    sample(tmp_path, guidance_scale=1.5, **how)
    x, label, null = initial_noise((4, 4, 4), ["1/0"]), torch.tensor([1]), torch.tensor([3])
    for t in (0.0, 0.5):
        given, nothing = (twins.transformer_forward(w, x, torch.tensor([t]), y) for y in (label, null))
        x = x + 0.5 * (nothing + 1.5 * (given - nothing))
    own = PublishedNetwork(str(tmp_path / "w.safetensors"), vae=str(tmp_path / "vae.pt")).autoencoder
    expected = twins.ldm_decoded(twins.ldm(), x / own.scaling + own.shift)[0].clamp(-1, 1)
    np.testing.assert_allclose(shown(tmp_path / "out", 1), expected, atol=0.01)
    with pytest.raises(ValueError, match=r"schedule: 'sit', but the family of .* has one of its own"):
        sample(tmp_path, "sit", schedule="sit", **how)
    with pytest.raises(ValueError, match=r"export: .* has weights of lightningdit, of which diffusers has no pipeline"):
        run("export", [f"--ckpt={tmp_path / 'w.safetensors'}", f"--out={tmp_path / 'pipeline'}"])


def test_an_edm2_is_sampled_by_eulers_method(tmp_path):
    """Against equations 3 to 5 of Karras et al. 2022, on pixels."""
    w = twins.edm2(classes=3, side=16, channels=3, widths=(64, 64))
    save_file(w, tmp_path / "w.safetensors")
    how = {"ckpt": tmp_path / "w.safetensors", "steps": 3, "per_class": 1, "classes": 2}
    sample(tmp_path, guidance_scale=1.0, **how)
    grid = [(80 ** (1 / 7) + i / 2 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(3)]
    x = 80 * initial_noise((3, 16, 16), ["2/0"])
    for now, after in zip(grid, [*grid[1:], 0.0], strict=True):
        denoised = twins.edm2_denoised(w, x, torch.tensor([now]), torch.tensor([2]))
        x = x + (after - now) * (x - denoised) / now
    np.testing.assert_allclose(shown(tmp_path / "out", 2), x[0].clamp(-1, 1), atol=0.01)
    with pytest.raises(ValueError, match=r"guidance_scale: 4\.0, but the network has no null label; expected 1"):
        sample(tmp_path, "guided", **how)


def test_labels_of_a_public_set(monkeypatch):
    monkeypatch.setitem(PUBLIC_SETS, "pets", PublicSet(lambda root, get: root, lambda root: [f"{root} cat", "dog"]))
    assert labels_of("@pets") == ["data cat", "dog"]
    assert labels_of("@pets:there") == ["there cat", "dog"]
    assert labels_of("a, b") == ["a", "b"]


def test_a_grid(digits, tmp_path):
    for name in ("grid.png", "grid.JPG"):
        assert sample(tmp_path, name) == {}
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100
    with pytest.raises(ValueError, match="out: a grid of 404 images, expected at most 400; or give a folder"):
        sample(tmp_path, "large.png", per_class=101)


def test_latents_are_decoded(tmp_path):
    module = checkpoint(tmp_path, vae=str(tmp_path / "vae"))
    vae = autoencoder(tmp_path / "vae")
    sample(tmp_path, classes="1", per_class=1, guidance_scale=1.0)
    with torch.no_grad():
        latents = module.sample(torch.tensor([1]), 1.0, 3, ids=["1/0"])
        expected = vae.decode(latents / 0.5 + 0.1).sample[0].clamp(-1, 1)
    found = np.asarray(Image.open(tmp_path / "out" / "0001" / "00000.png"))
    np.testing.assert_allclose(found.transpose(2, 0, 1) / 127.5 - 1, expected.numpy(), atol=0.005)
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match="vae: none given"):
        sample(tmp_path, "other")
    sample(tmp_path, "other", vae=tmp_path / "vae", per_class=1)


def test_published_weights_say_their_sizes(tmp_path):
    weights = load_file(GOLDEN / "dit" / "dit_tiny.safetensors")
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"wide, expected one of \[384, 768, 1024, 1152, 1536, 1792\]"):
        config_of(tmp_path / "weights.pt")
    module = checkpoint(tmp_path)
    to_diffusers(module.net).save_pretrained(tmp_path / "pipeline" / "transformer")
    autoencoder(tmp_path / "pipeline" / "vae")
    again = network_of(str(tmp_path / "pipeline"), None, "linear")
    for name, value in module.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value)
    assert again.hparams["vae"] == str(tmp_path / "pipeline/vae")
    sample(tmp_path, ckpt=tmp_path / "pipeline", per_class=1)
    with pytest.raises(ValueError, match=r"holds other samples \(schedule\.alphas_cumprod: '.*' there, '.*' here\)"):
        sample(tmp_path, ckpt=tmp_path / "pipeline", per_class=1, schedule="cosine")
    flow = network_of(str(tmp_path / "pipeline"), None, "sit")
    assert flow.schedule.prediction == "velocity"
    assert flow.net.out_channels == 4


def test_mistakes_are_told(digits, tmp_path):
    assert chosen_classes("all", digits.candidates.names) == [0, 1, 2, 3]
    assert chosen_classes("two, 0,2", digits.candidates.names) == [2, 0]
    for settings, message in (
        ({"classes": "five"}, r"classes: \['five'\], expected names or numbers 0 … 3, or all"),
        ({"classes": ","}, "classes: ','"),
        ({"per_class": 0}, "per_class: 0"),
        ({"steps": 0}, "steps: 0, expected 1 … 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(tmp_path, **settings)
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'nothing.ckpt'"):
        sample(tmp_path, ckpt="nothing.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt' is a file, expected a folder, or a grid named .png or .jpg"):
        sample(tmp_path, "last.ckpt")
    with pytest.raises(SystemExit):
        sample(tmp_path, precision="bf16-true")
