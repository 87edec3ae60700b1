import io
import itertools
import os
import tarfile
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from lightning_diffclf.data.images import transform
from lightning_diffclf.data.packing import pack, plan_shards
from lightning_diffclf.data.shards import ShardImages, ShardIndex, Shards, ShardStream
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_checked_json
from tests.photos import photos


def packed(tmp_path, images_per_shard=4, each=7, processes=1):
    files = photos(tmp_path / "images", each=each)
    plans = plan_shards(files, tmp_path / "shards", images_per_shard)
    counts = {plan.path.name: len(plan.files) for plan in plans}
    index = ShardIndex(counts, ["cat", "dog", "owl"], positions=True, seed=0)
    assert sorted(path.name for path in pack(plans, index, processes)) == sorted(counts)
    return files, tmp_path / "shards"


def prepare(image, rng=None):
    return transform(8, 8)(image)


def keep(samples):
    return samples


def read(shards, world_size=1, workers=0):
    found = []
    for rank in range(world_size):
        images = ShardImages(Shards(str(shards)), prepare, rank, world_size)
        found += [s for batch in DataLoader(images, 3, num_workers=workers, collate_fn=keep) for s in batch]
    return found


def test_packing_keeps_files_labels_and_positions(tmp_path):
    files, out = packed(tmp_path, processes=2)
    shards = Shards(str(out))
    assert shards.index.counts == dict(zip([f"shard-{i:06d}.tar" for i in range(6)], [4, 4, 4, 4, 4, 1], strict=True))
    seen = {}
    for url in shards.urls:
        with tarfile.open(url) as tar:  # nothing of ours reads it
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in members:
            if name.endswith(".png"):
                seen[int(name[:-4])] = (members[name], int(members[name.replace(".png", ".cls")]))
    assert seen == {position: (path.read_bytes(), label) for position, (path, label) in enumerate(files)}
    assert len({label for position in list(seen)[:4] for label in [seen[position][1]]}) > 1  # mixed


def test_packing_goes_on_where_it_was_stopped(tmp_path):
    files, out = packed(tmp_path)
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    (out / "index.json").rename(out / "index.json.planned")  # as if it had been stopped
    (out / "shard-000003.tar").unlink()
    (out / "shard-000004.tmp").write_bytes(b"half")
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    plans = plan_shards(files, out, 4)
    index = ShardIndex(**read_checked_json(out / "index.json.planned"))
    list(pack(plans, index))
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    found = {path.name for path in out.glob("*.tar")}
    assert found == set(whole)
    assert ShardIndex.read(out) == index
    with pytest.raises(ValueError, match="holds other shards"):
        list(pack(plan_shards(files, out, 5), ShardIndex({}, [], positions=True, seed=0)))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2), (8, 0)])
def test_evaluation_reads_each_image_once(tmp_path, world_size, workers):
    files, out = packed(tmp_path)
    found = read(out, world_size, workers)
    assert sorted(sample["id"] for sample in found) == list(range(21))
    assert all(sample["label"] == files[sample["id"]][1] for sample in found)


def stream(out, rank=0, world_size=1, **settings):
    return ShardStream(Shards(str(out), settings.get("skip_bad", 0)), prepare, rank, world_size, **settings)


def take(data, count, workers=0):
    loader = DataLoader(data, 1, num_workers=workers, collate_fn=keep)
    return [sample["id"] for batch in itertools.islice(loader, count) for sample in batch]


def test_training_mixes_and_misses_nothing(tmp_path):
    _, out = packed(tmp_path)
    # what is still in the buffer after so many passes is all that may differ between images
    counts = Counter(take(stream(out, buffer=5), 21 * 20))
    assert set(counts) == set(range(21))
    assert max(counts.values()) - min(counts.values()) <= 2
    first = take(stream(out, buffer=5), 21)
    assert first == take(stream(out, buffer=5), 21)
    assert first != take(stream(out, buffer=5, step=100), 21)
    assert first != take(stream(out, buffer=5, seed=1), 21)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (2, 2), (4, 3)])
def test_training_deals_shards_out(tmp_path, world_size, workers):
    _, out = packed(tmp_path, images_per_shard=1)
    ranks = [take(stream(out, rank, world_size, buffer=1), 40, workers) for rank in range(world_size)]
    assert len({tuple(one) for one in ranks}) == world_size
    counts = Counter(i for one in ranks for i in one)
    assert set(counts) == set(range(21))
    assert max(counts.values()) - min(counts.values()) <= 2 + 2 * world_size


def truncated(out, name="shard-000002.tar"):
    path = out / name
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size // 2 + 7)
    return path


def test_damaged_shards_are_named_skipped_and_counted(tmp_path, capsys):
    _, out = packed(tmp_path)
    path = truncated(out)
    with pytest.raises(ValueError, match=f"shard '{path}' .*1 of 6 shards are damaged, expected at most a share of 0"):
        take(stream(out, buffer=3), 60)
    with pytest.raises(ValueError, match=path.name):
        read(out)  # evaluation skips nothing
    ids = set(take(stream(out, buffer=3, skip_bad=0.2), 200))
    assert len(ids) >= 21 - 4
    assert f"warning: data: shard '{path}'" in capsys.readouterr().err
    truncated(out, "shard-000003.tar")
    with pytest.raises(ValueError, match=r"2 of 6 shards are damaged, expected at most a share of 0.2"):
        take(stream(out, buffer=3, skip_bad=0.2), 200)


def test_a_shard_cut_between_images_is_noticed(tmp_path):
    _, out = packed(tmp_path)
    path = out / "shard-000001.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar][:4]
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="has 2 images, expected 4"):
        read(out)


def test_a_shard_of_nothing_is_noticed_and_one_that_the_index_does_not_name(tmp_path, capsys):
    _, out = packed(tmp_path)
    (out / "shard-000006.tar").write_bytes((out / "shard-000000.tar").read_bytes())
    assert len(read(out)) == 21
    assert "warning: 1 shards in" in (said := capsys.readouterr().err)
    assert said.endswith("such as shard-000006.tar\n")
    (out / "index.json").unlink()
    (out / "shard-000002.tar").write_bytes(bytes(20_480))  # as a crash of the machine leaves it
    with pytest.raises(UserError, match=r"shard-000002.tar' has no images"):
        read(out)


def test_missing_shards(tmp_path, capsys):
    _, out = packed(tmp_path)
    os.unlink(out / "shard-000002.tar")
    with pytest.raises(FileNotFoundError, match=r"no shard .*shard-000002.tar' \(1 of 6 are missing\)"):
        Shards(str(out))
    assert len(Shards(str(out), skip_bad=0.2).urls) == 5
    assert "1 of 6 shards are missing" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no shard"):
        Shards(str(out / "other-{000..003}.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no shard in"):
        Shards(str(tmp_path / "empty"))


def test_bad_samples(tmp_path, capsys):
    _, out = packed(tmp_path, images_per_shard=21)

    def rewrite(change):
        path = out / "shard-000000.tar"
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w") as tar:
            for number, (member, content) in enumerate(members):
                name, content = change(number, member.name, content)
                if name is not None:
                    member.name, member.size = name, len(content)
                    tar.addfile(member, io.BytesIO(content))

    rewrite(lambda i, name, content: (name, b"no image" if name == "00000005.png" else content))
    with pytest.raises(ValueError, match=r"sample 00000005 in .* cannot be read"):
        read(out)
    with pytest.raises(ValueError, match=r"1 of .* images are damaged"):
        take(stream(out, buffer=3), 30)
    assert 5 not in take(stream(out, buffer=3, skip_bad=0.1), 200)
    assert "sample 00000005" in capsys.readouterr().err
    rewrite(lambda i, name, content: (None if name.endswith(".cls") else name, content))
    with pytest.raises(ValueError, match=r"has \['png'\], expected an image \(jpg, png, …\) and cls"):
        read(out)
