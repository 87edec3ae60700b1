"""A tiny set in the layout of clip-benchmark's."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.data.clip_benchmark import NAMES, TEMPLATES, ClipBenchmarkDataModule
from tests.baselines.evaluation import evaluate
from tests.baselines.tiny_clip import write_clip

LABELS = [0, 1, 2, 1, 0]


@pytest.fixture
def root(tmp_path):
    """As ``clip-benchmark/wds_*``: webp images, labels as text, the number of shards beside them."""
    folder, rng = tmp_path / "wds", np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    (folder / NAMES).write_text("cat\ndog\nsnowy owl\n")
    (folder / TEMPLATES).write_text("a photo of a {c}.\na drawing of a {c}.\n")
    (folder / "test" / "nshards.txt").write_text("2")
    for shard, rows in enumerate([LABELS[:3], LABELS[3:]]):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for i, label in enumerate(rows):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(picture, "WEBP")
                for suffix, content in (("cls", str(label).encode()), ("webp", picture.getvalue())):
                    member = tarfile.TarInfo(f"s{3 * shard + i:07}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def test_names_prompts_and_images_come_with_the_data(root, tmp_path):
    data = ClipBenchmarkDataModule(str(root), templates=None, eval_batch_size=2, num_workers=0)
    module = ZeroShotCLIP(write_clip(tmp_path / "clip"), "not {} asked")
    rows, report = evaluate(tmp_path / "out", module, data, ensemble="mean")
    assert sorted(rows["label"]) == sorted(LABELS)
    assert dict(zip(rows["id"], rows["label"], strict=True)).keys() == {f"{i // 3}/s{i:07}" for i in range(5)}
    assert module.prompt_set.prompts[-2:] == ["a photo of a snowy owl.", "a drawing of a snowy owl."]
    assert report["settings"]["class_names"] == ["cat", "dog", "snowy owl"]
    assert len(ClipBenchmarkDataModule(str(root)).prompt_set.prompts) == 3  # the first template alone


def test_what_is_not_in_that_layout(root):
    (root / TEMPLATES).write_text("a photo\n")
    with pytest.raises(ValueError, match=r"template: 'a photo', expected '\{\}'"):
        _ = ClipBenchmarkDataModule(str(root)).prompt_set
    (root / TEMPLATES).write_text("\n")
    with pytest.raises(ValueError, match=r"zeroshot_classification_templates.txt' is empty"):
        _ = ClipBenchmarkDataModule(str(root)).prompt_set
    (root / NAMES).unlink()
    with pytest.raises(FileNotFoundError, match=r"data: no '.*classnames.txt', expected the layout of clip-benchmark"):
        _ = ClipBenchmarkDataModule(str(root)).class_names
    with pytest.raises(ValueError, match="templates: 0, expected at least 1"):
        ClipBenchmarkDataModule(str(root), templates=0)
