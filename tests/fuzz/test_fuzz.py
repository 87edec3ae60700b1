"""Whatever is thrown at what users and files of others can say: an error of ours, or a result; never a traceback.

Seconds in the usual run; hours with ``DIFFCLF_FUZZ=1000 python -m pytest tests/fuzz``, which tries a thousand times
as many inputs. ``DIFFCLF_FUZZ_SEED`` starts elsewhere.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from lightning_diffclf import (
    Candidates,
    ClassConditionalDiT,
    DiffusionClassifierCallback,
    Draws,
    LikelihoodRatio,
    NoiseSchedule,
    PairedTest,
    Posterior,
    Stages,
)
from lightning_diffclf.classifier import Loss, Recipe
from lightning_diffclf.cli import CONFIG_KEY, evaluation_config
from lightning_diffclf.data.caption_pairs import CaptionPairsDataModule
from lightning_diffclf.data.imagenet import ImageNetDataModule
from lightning_diffclf.data.images import open_image
from lightning_diffclf.data.latents import Latents
from lightning_diffclf.data.medmnist import MedMNISTDataModule
from lightning_diffclf.data.parquet import ParquetDataModule
from lightning_diffclf.data.prompts import from_csv, from_names
from lightning_diffclf.data.shards import ShardImages, ShardIndex, Shards, expand
from lightning_diffclf.data.winoground import read_groups
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_checked_json
from lightning_diffclf.models.families import read_network, read_statistics
from lightning_diffclf.models.ldm_autoencoder import ldm_autoencoder
from lightning_diffclf.models.pipeline import check_parts
from lightning_diffclf.models.published import config_of, is_published, read_published
from lightning_diffclf.modules.checkpoints import trained_module
from lightning_diffclf.results.errors import ErrorsInfo
from lightning_diffclf.results.evaluation import Evaluation
from tests.fuzz.mutations import STRANGE, damaged, mutated, rounds, strange_text
from tests.models import published_twins as twins
from tests.results.made_up import made_up_rows, made_up_run
from tests.security.test_settings import settings
from tests.security.test_weights import ARGUMENTS, latents

SEED = int(os.environ.get("DIFFCLF_FUZZ_SEED", "0"))

Target = Callable[[np.random.Generator], Iterator[Callable[[], Any]]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fuzz(attempt: Callable[[np.random.Generator], Any], times: int) -> None:
    """Try so many inputs; each gives a result or an error of ours, and no command is run."""
    answered = 0
    for number in range(rounds(times)):
        rng = np.random.default_rng([SEED, number])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt(rng)
            answered += 1
        except UserError as error:
            if not str(error).strip() or len(str(error)) > 3000:
                raise AssertionError(f"input {number}: a message of {len(str(error))} characters") from error
        except Exception as error:
            raise AssertionError(f"input {number} (seed {SEED}): {type(error).__name__}: {error}") from error
    assert not Path("PWNED").exists()
    assert answered < rounds(times)  # some of them must be wrong


def choice(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


# --- Python --------------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = tuple(
    one for one in STRANGE if isinstance(one, (int, float)) and not isinstance(one, bool) and not abs(one) > 1e13
)  # of the annotated kind: type checkers and the command line refuse others

MAKERS: dict[str, tuple[Callable[..., Any], dict[str, tuple[Any, ...]]]] = {
    "Candidates": (
        Candidates,
        {"names": ("abc", ["a"], [], ["a", "b"], ("",)), "classes": (None, [0], [0, 1], [0, 0.5], ["a"], [None], [-1])},
    ),
    "Draws": (
        lambda timesteps, **others: Draws(timesteps=timesteps, **others).visit(NoiseSchedule.linear()),
        {
            "count": tuple(one for one in NUMBERS if isinstance(one, int)),
            "timesteps": (None, torch.tensor([5]), torch.tensor([-5]), torch.tensor([0.5]), torch.zeros(0), [3]),
        },
    ),
    "Recipe": (
        Recipe,
        {
            "draws": (None, 0, 1, 5, -1),
            "loss": ("l2", "l1+l2", "", "kl", "+", "l3", "[red]"),
            "weights": ("uniform", "", "x", [1.0], []),
            "budget": (None, 0, -5, 10**12),
            "abstain": NUMBERS,
            "ensemble": ("best", "mean", "", "x"),
            "candidates": (None, [], [0]),
            "reduction": ("sum", "mean", ""),
            "temperature": NUMBERS,
        },
    ),
    "Posterior": (Posterior, {"reduction": ("sum", "mean", "", "x"), "temperature": NUMBERS}),
    "Loss": (Loss, {"name": ("l2", "", "+", "l2+", "a" * 100, "l2+l2", "\0")}),
    "Stages": (Stages, {"samples": ((), (1,), (5, 2), (0, 1), (2, 5)), "keep": ((), (1,), (5, 1), (0, 1), (1, 5))}),
    "PairedTest": (PairedTest, {"alpha": NUMBERS, "growth": NUMBERS}),
    "LikelihoodRatio": (LikelihoodRatio, {"alpha": NUMBERS}),
    "linear": (NoiseSchedule.linear, {"num_timesteps": (0, 1, 1000, -1), "beta_start": NUMBERS, "beta_end": NUMBERS}),
    "callback": (
        DiffusionClassifierCallback,
        {
            "draws": (None, 0, 5), "loss": ("l2", "x"), "microbatch": (0, 1, -1, 256), "candidates": (None, [], [0]),
            "temperature": NUMBERS, "abstain": NUMBERS, "part": (None, "", "1/2", "3/2", "a/b", "1/0", "-1/2"),
            "output_dir": (None, "", " ", "\0", "x"), "fit_images": (None, -1, 0), "flush_every": (0, 1),
        },
    ),
    "module": (
        ClassConditionalDiT,
        {
            "input_size": (8, 0, -8, 7, [8], [8, 8], [8, 0]), "in_channels": (1, 0, -1), "num_classes": (10, 0, -1, 1),
            "hidden_size": (16, 0, 15, -16), "depth": (1, 0, -1), "num_heads": (2, 0, 3), "patch_size": (2, 0, 3, 9),
            "class_dropout_prob": (0.1, -1.0, 2.0, float("nan")), "latents": (False,), "learn_sigma": (False, True),
            "lr": (1e-3, 0.0, -1.0, float("nan")), "class_names": (None, [], ["a"] * 10), "vae": (None, "x"),
            "mlp_ratio": (4.0, 0.0, -1.0, float("nan")), "warmup_steps": (0, -1), "model": (None, "DiT-X/2", ""),
        },
    ),
    "imagenet": (
        ImageNetDataModule,
        {"size": (8, 0, -1), "batch_size": (1, 0), "skip_bad": NUMBERS, "buffer": (1, 0), "num_workers": (0, -1)},
    ),
    "zero_shot": (
        ZeroShotDataModule,
        {"name": ("folder", "", "x", "webdataset"), "per_class": (None, 0, 1), "subset": (None, "x"), "size": (8, 0)},
    ),
    "names": (
        from_names,
        {"class_names": ([], ["a"], ["a", "a"], [""], ["a_b"], ["{}"]), "templates": ("{}", "", "x", [], ["{} {}"])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_values(name):
    make, arguments = MAKERS[name]

    def attempt(rng: np.random.Generator) -> None:
        make(**{argument: choice(rng, values) for argument, values in arguments.items()})

    fuzz(attempt, 60)


# --- files of others -----------------------------------------------------------------------------------------------

number = itertools.count()


def written(content: bytes, suffix: str) -> Path:
    """A new file, which replaces the one before."""
    for path in Path().glob(f"*.fuzz{suffix}"):
        path.unlink()
    path = Path(f"{next(number)}.fuzz{suffix}")
    path.write_bytes(content)
    return path


def test_settings_in_checkpoints():
    usual = settings()

    def attempt(rng: np.random.Generator) -> None:
        changed = mutated(json.loads(json.dumps(usual)), rng)
        try:
            text: Any = yaml.safe_dump(changed)
        except yaml.YAMLError:  # what YAML cannot say
            text = repr(changed)
        if rng.random() < 0.3:
            text = damaged(text.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
        path = Path(f"{next(number)}.ckpt")
        torch.save({"state_dict": {}, CONFIG_KEY: text}, path)
        try:
            kept = evaluation_config(path)
        finally:
            path.unlink()
        for harm in ("pipe:", "://", "os.system", "\0"):
            assert harm not in kept

    fuzz(attempt, 300)


def test_yaml_files():
    from lightning_diffclf.cli import default_run_dir

    usual = (Path(__file__).parents[2] / "configs" / "dit_digits.yaml").read_bytes()

    def attempt(rng: np.random.Generator) -> None:
        content = damaged(usual, rng) if rng.random() < 0.5 else strange_text(rng).encode("utf-8", "replace")
        default_run_dir(None, [str(written(content, ".yaml"))])

    fuzz(attempt, 100)


def test_prompts():
    usual = "prompt,classname,classidx\n" + "".join(f"a photo of a {c},{c},{i}\n" for i, c in enumerate("abcdef"))

    def attempt(rng: np.random.Generator) -> None:
        if rng.random() < 0.5:
            content = damaged(usual.encode(), rng)
        else:
            lines = usual.splitlines()
            lines[int(rng.integers(len(lines)))] = strange_text(rng)
            content = "\n".join(lines).encode(choice(rng, ["utf-8", "utf-16", "utf-8-sig"]), "replace")
        from_csv(written(content, ".csv"))

    fuzz(attempt, 600)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_pictures(kind):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    usual = buffer.getvalue()

    def attempt(rng: np.random.Generator) -> None:
        assert open_image(written(damaged(usual, rng), ".png")).mode == "RGB"
        raise UserError("read")  # of most formats, all damages may be pictures as well

    fuzz(attempt, 120)


def test_shards():
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in range(4):
            for suffix, content in (("png", picture.getvalue()), ("cls", b"1")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    usual = buffer.getvalue()
    Path("x").mkdir()
    Path("x/index.json").write_text(json.dumps({"counts": {"0.tar": 4}}))

    def attempt(rng: np.random.Generator) -> None:
        Path("x/0.tar").write_bytes(damaged(usual, rng))
        found = list(ShardImages(Shards("x"), lambda image: image.size))
        assert len(found) == 4  # nothing is skipped

    fuzz(attempt, 500)


def test_indexes_of_shards():
    Path("x").mkdir()
    usual = {"counts": {"0.tar": 4}, "classes": ["a"], "network_classes": [[0]], "positions": False, "seed": 0}

    def attempt(rng: np.random.Generator) -> None:
        Path("x/index.json").write_bytes(json_of(mutated(usual, rng), rng))
        ShardIndex.read(Path("x"))
        Shards("x")

    fuzz(attempt, 400)


def test_patterns():
    def attempt(rng: np.random.Generator) -> None:
        for url in expand(strange_text(rng)):
            Shards(url)

    fuzz(attempt, 400)


def json_of(value: Any, rng: np.random.Generator) -> bytes:
    """As JSON, sometimes damaged; what JSON cannot say, as text."""
    content = json.dumps(value, default=repr).encode()
    return damaged(content, rng) if rng.random() < 0.3 else content


def test_latents():
    folder = latents()
    usual = read_checked_json(folder / "index.json")
    arrays = {name: (folder / f"{name}.npy").read_bytes() for name in ("moments", "labels")}

    def attempt(rng: np.random.Generator) -> None:
        if rng.random() < 0.6:
            (folder / "index.json").write_bytes(json_of(mutated(usual, rng), rng))
        else:
            (folder / "index.json").write_text(json.dumps(usual))
            name = choice(rng, list(arrays))
            (folder / f"{name}.npy").unlink()
            (folder / f"{name}.npy").write_bytes(damaged(arrays[name], rng))
        found = Latents(str(folder))
        assert found[0]["image"].shape == (1, 2, 2)

    fuzz(attempt, 300)


def test_weights():
    model = ClassConditionalDiT(**ARGUMENTS)
    arguments = json.loads(json.dumps(dict(model.hparams)))

    def attempt(rng: np.random.Generator) -> None:
        changed = mutated(arguments, rng)
        saved = {"state_dict": model.state_dict(), "hyper_parameters": plain(changed)}
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        content = damaged(buffer.getvalue(), rng) if rng.random() < 0.3 else buffer.getvalue()
        trained_module(written(content, ".ckpt"))

    fuzz(attempt, 100)


def plain(value: Any) -> Any:
    """Without what cannot be saved."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (type(None), bool, int, float, str, bytes)) else repr(value)


def test_published_weights():
    buffer = io.BytesIO()
    torch.save(ClassConditionalDiT(**ARGUMENTS).net.state_dict(), buffer)
    usual = buffer.getvalue()

    def attempt(rng: np.random.Generator) -> None:
        if rng.random() < 0.5:
            path = written(damaged(usual, rng), choice(rng, [".pt", ".bin", ".safetensors"]))
        else:
            weights: dict[Any, Any] = torch.load(io.BytesIO(usual), weights_only=True)
            name = choice(rng, list(weights))
            weights[name] = choice(rng, [torch.zeros(0), torch.zeros(()), torch.zeros(1, 1, 1, 1, 1), 3, None, "a"])
            path = Path(f"{next(number)}.pt")
            torch.save(weights, path)
        is_published(path)
        read_published(path)
        config_of(path)

    fuzz(attempt, 150)


TWINS = {
    "sit": twins.transformer(width=16, depth=1, heads=4, side=4, classes=2),
    "lightningdit": twins.transformer(width=16, depth=1, heads=4, side=4, classes=2, rope=True, rms=True, swiglu=True),
    "edm2": twins.edm2(side=2, widths=(64,), blocks=1, attention=(), classes=2),
}


@pytest.mark.parametrize("family", TWINS)
def test_networks_of_families(family):
    usual = TWINS[family]

    def attempt(rng: np.random.Generator) -> None:
        weights: dict[Any, Any] = dict(usual)
        for _ in range(int(rng.integers(1, 3))):
            name = choice(rng, list(usual))
            value = usual[name]
            weights.pop(name, None)
            other = choice(
                rng, [torch.zeros(0), torch.zeros(()), torch.zeros(1, 1, 1, 1, 1), 3, None, "a", value.flatten()[:1]]
            )
            weights[name if rng.random() < 0.7 else f"{name}.x"] = other if rng.random() < 0.8 else value
        path = Path(f"{next(number)}.pt")
        torch.save(weights, path)
        read_network(path, choice(rng, [family, None]), num_heads=4)

    fuzz(attempt, 100)


def test_autoencoders_of_latent_diffusion():
    usual = twins.ldm(widths=(32, 32))

    def attempt(rng: np.random.Generator) -> None:
        weights: dict[Any, Any] = dict(usual)
        name = choice(rng, list(weights))
        weights[name] = choice(rng, [torch.zeros(0), torch.zeros(()), torch.zeros(1, 1, 1, 1, 1), 3, None, "a"])
        if rng.random() < 0.3:
            del weights[name]
        ldm_autoencoder(weights, "x")

    fuzz(attempt, 60)


def test_statistics_of_latents():
    def attempt(rng: np.random.Generator) -> None:
        values = [torch.zeros(4), torch.ones(4), torch.ones(()), torch.zeros(0), torch.full((4,), math.nan), 3, None]
        path = Path(f"{next(number)}.pt")
        names = choice(rng, [("mean", "std"), ("latents_bias", "latents_scale"), ("mean", 3)])
        torch.save({name: choice(rng, values) for name in names}, path)
        read_statistics(str(path))

    fuzz(attempt, 60)


def test_parquet():
    image = {"bytes": b"no image", "path": None}
    table = pa.table({"image": [image] * 3, "label": [0, 1, 0]})
    table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {"label": {"names": ["a", "b"]}}}}'})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    usual = buffer.getvalue()

    def attempt(rng: np.random.Generator) -> None:
        source = ParquetDataModule(str(written(damaged(usual, rng), ".parquet"))).source
        source[int(rng.integers(len(source)))]

    fuzz(attempt, 150)


def test_medmnist():
    buffer = io.BytesIO()
    np.savez(buffer, test_images=np.zeros((3, 4, 4), np.uint8), test_labels=np.zeros((3, 1), np.uint8))
    usual = buffer.getvalue()

    def attempt(rng: np.random.Generator) -> None:
        path = written(damaged(usual, rng), ".npz")
        source = MedMNISTDataModule(str(path), class_names=["a", "b"]).source
        source[int(rng.integers(len(source)))]

    fuzz(attempt, 150)


def test_caption_pairs():
    usual = [{"filename": "0.png", "caption": "a", "negative_caption": "b"}]
    usual += [{"image_path": "0.png", "true_caption": "a", "false_caption": "b", "relation_name": "on"}]
    usual[1] |= {"bbox_x": 0, "bbox_y": 0, "bbox_w": 3, "bbox_h": 3}  # type: ignore[dict-item]
    Image.new("RGB", (4, 4)).save("0.png")

    def attempt(rng: np.random.Generator) -> None:
        path = written(json_of(choice(rng, [usual, {"0": usual[0]}]), rng), ".json")
        data = CaptionPairsDataModule(str(path), ".", size=4)
        data.setup()
        _ = [data.test[i] for i in range(len(data.test))], data.prompt_set

    fuzz(attempt, 150)


def test_pipelines():
    usual = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.33", "unet": ["diffusers", "UNet2DModel"],
        "text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None],
    }  # fmt: skip

    def attempt(rng: np.random.Generator) -> None:
        check_parts(mutated(usual, rng), "x")

    fuzz(attempt, 300)


def test_runs():
    run = made_up_run(Path("run"), made_up_rows(20, 3), 3)
    usual = json.loads((run / "settings.json").read_text())
    table = (run / "predictions.parquet").read_bytes()

    def attempt(rng: np.random.Generator) -> None:
        changed, content = usual, table
        if rng.random() < 0.5:
            changed = usual | {"info": mutated(usual["info"], rng)} if rng.random() < 0.7 else mutated(usual, rng)
        else:
            content = damaged(table, rng)
        (run / "settings.json").write_bytes(json_of(changed, rng))
        (run / "predictions.parquet").unlink()
        (run / "predictions.parquet").write_bytes(content)
        evaluation = Evaluation.read(run)
        assert evaluation.images == 20
        assert evaluation.summary.numbers()["images"] == 20

    fuzz(attempt, 100)


def test_descriptions_of_errors():
    usual = ErrorsInfo("l2", 0, (1, 2), (0.5, 0.1), ("a", "b"), (0, 1), "Exhaustive()")

    def attempt(rng: np.random.Generator) -> None:
        ErrorsInfo.from_json(json_of(mutated(json.loads(usual.to_json()), rng), rng))

    fuzz(attempt, 300)


def test_winoground():
    row = {"image_0": "a", "image_1": "b", "caption_0": "c", "caption_1": "d", "id": 1, "tag": "x"}
    for name in "ab":
        Image.new("RGB", (8, 8)).save(f"{name}.png")

    def attempt(rng: np.random.Generator) -> None:
        Path("x.jsonl").write_bytes(json_of(mutated(row, rng), rng) + b"\n" + json_of(row, rng))
        read_groups("x.jsonl")

    fuzz(attempt, 300)
