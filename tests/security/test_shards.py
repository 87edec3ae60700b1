"""Tar shards and their index run nothing, open nothing else, and are read whole or not at all."""

import gzip
import io
import json
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from lightning_diffclf.data.imagenet import ImageNetDataModule
from lightning_diffclf.data.shards import ShardImages, Shards
from lightning_diffclf.errors import UserError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)


def jpeg(size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "JPEG")
    return buffer.getvalue()


def member(name, content=b"", **changed) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in changed.items():
        setattr(info, attribute, value)
    return info, content


def pair(key) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.jpg", jpeg()), member(f"{key}.cls", b"3")]


def shard(path, members, compression="") -> Path:
    with tarfile.open(path, f"w{compression}") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if content else None)
    return Path(path)


def ids(path=".") -> list:
    return [one["id"] for one in ShardImages(Shards(str(path)), lambda image: image.size)]


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch PWNED",
        "PIPE:touch PWNED",
        "http:x';touch PWNED;'",
        "https://example.org/x.tar",
        "file:///etc/passwd",
        "../outside.tar",
        "..",
        "",
        "/etc/passwd",
        "a/b.tar",
        "a\\b.tar",
        "{pipe,x}:touch PWNED",
        "a.tar|touch PWNED",
        "nul\0.tar",
        "line\n.tar",
    ],
)
@pytest.mark.parametrize("pattern", [".", "../inside", "0.tar"])
def test_an_index_names_files_of_its_folder_only(name, pattern):
    shard("0.tar", pair("a"))
    shard("../outside.tar", pair("b"))
    Path("index.json").write_text(json.dumps({"counts": {name: 1}}))
    data = ImageNetDataModule(val=pattern, num_workers=0, size=8)
    with pytest.raises(UserError, match=r"names a shard .*, expected the plain name of a file in its folder"):
        data.setup("test")
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"counts": ["0.tar"]},
        {"counts": {"0.tar": -1}},
        {"counts": {"0.tar": "1"}},
        {"counts": {"0.tar": 1}, "classes": "abc"},
        {"counts": {"0.tar": 1}, "classes": [{"a": 1}]},
        {"counts": {"0.tar": 1}, "network_classes": [1]},
        {"counts": {"0.tar": 1}, "network_classes": {"a": 1}},
        {"counts": {"0.tar": 1}, "positions": "yes"},
        {"counts": {"0.tar": 1}, "seed": []},
        {"counts": {"0.tar": 1}, "what": 1},
        [],
        "x",
    ],
)
def test_an_index_of_another_kind_is_one_error(values):
    shard("0.tar", pair("a"))
    Path("index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"shards: 'index\.json'"):
        Shards(".")
    Path("index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"shards: 'index\.json' cannot be read"):
        Shards(".")


@pytest.mark.parametrize("name", ["pipe:touch PWNED;x.tar", "http:x';touch PWNED;'.tar", "-.tar"])
def test_names_of_files_run_nothing(name):
    """Without an index, names come from the folder."""
    shard(name, pair("a"))
    assert ids(".") == [f"{name.removesuffix('.tar')}/a"]
    assert not Path("PWNED").exists()


OUTSIDE = "../outside.jpg"

STRANGE = {
    "a link to a file outside": [member("a.jpg", type=tarfile.SYMTYPE, linkname=OUTSIDE), member("a.cls", b"3")],
    "a hard link": [member("a.jpg", type=tarfile.LNKTYPE, linkname=OUTSIDE), member("a.cls", b"3")],
    "a device": [member("a.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), member("a.cls", b"3")],
    "a pipe": [member("a.jpg", type=tarfile.FIFOTYPE), member("a.cls", b"3")],
    "a sparse file of 1 TB": [member("a.jpg", type=tarfile.GNUTYPE_SPARSE), member("a.cls", b"3")],
    "a link that no sample needs": [*pair("a"), member("b.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a key twice": [*pair("a"), *pair("b"), *pair("a")],
    "a member twice": [*pair("a"), member("a.cls", b"4")],
    "an image without a class": [member("a.jpg", jpeg())],
    "a class without an image": [member("a.cls", b"3")],
    "a class that is no number": [member("a.jpg", jpeg()), member("a.cls", b"three")],
    "a class with too many digits": [member("a.jpg", jpeg()), member("a.cls", b"9" * 5000)],
    "an image that is none": [member("a.jpg", b"hello"), member("a.cls", b"3")],
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_members_are_one_error(name):
    Path(OUTSIDE).write_bytes(jpeg())
    shard("0.tar", STRANGE[name])
    with pytest.raises(UserError, match=r"0\.tar"):
        ids()
    assert sorted(path.name for path in Path("..").iterdir()) == ["inside", "outside.jpg"]
    assert [path.name for path in Path().iterdir()] == ["0.tar"]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "../../x/y"])
def test_members_with_names_outside_are_not_unpacked(name):
    shard("0.tar", pair(name))
    assert ids() == [f"0/{name}"]
    assert [path.name for path in Path("..").iterdir()] == ["inside"]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2**40, 2**62, 2**29])
@pytest.mark.parametrize("compression", ["", ":gz"])
def test_members_of_a_terabyte_take_no_memory(kind, size, compression):
    info = member("a.jpg", type=kind)[0]
    info.size = size
    head = info.tobuf(tarfile.GNU_FORMAT)
    path = shard("0.tar", pair("b"), compression)
    plain = (path.read_bytes() if not compression else gzip.decompress(path.read_bytes()))[:-10240]
    content = head + bytes(2**20)
    whole = plain.rstrip(b"\0") + bytes(-len(plain.rstrip(b"\0")) % 512) + content
    path.write_bytes(gzip.compress(whole) if compression else whole)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"claims .* bytes, expected at most"):
        ids()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_a_range_of_shards_takes_no_memory():
    for pattern in ("{0..99999999999}.tar", "".join(["{a,b}"] * 40), "{0..9999}{0..9999}.tar"):
        with pytest.raises(UserError, match="expected at most 1,000,000"):
            Shards(pattern)
    for pattern in ("{0..", "${NO_SUCH_VARIABLE}.tar"):
        with pytest.raises(UserError):
            Shards(pattern)


# --- nothing is skipped --------------------------------------------------------------------------------------------


def test_equal_keys_in_two_shards_are_two_images():
    for name in ("0.tar", "1.tar"):
        shard(name, [*pair("000000"), *pair("000001")])
    assert ids() == ["0/000000", "0/000001", "1/000000", "1/000001"]
    for folder in ("x", "y"):
        Path(folder).mkdir()
        shard(f"{folder}/0.tar", pair("000000"))
    assert ids("{x,y}/0.tar") == ["x/0/000000", "y/0/000000"]


def test_an_id_that_occurs_again_is_refused_at_once():
    """Keys of a wrong index, which says that they are positions."""
    for name in ("0.tar", "1.tar"):
        shard(name, [*pair("000000"), *pair("000001")])
    Path("index.json").write_text(json.dumps({"counts": {"0.tar": 2, "1.tar": 2}, "positions": True}))
    images = iter(ShardImages(Shards("."), lambda image: image.size))
    assert [next(images)["id"], next(images)["id"]] == [0, 1]
    with pytest.raises(UserError, match=r"000000 in \./1\.tar has the id 0 of another image"):
        next(images)


def test_names_that_begin_with_a_dot_are_images():
    shard(
        "0.tar", [*pair(".hidden"), *pair("folder/.also"), *pair("./usual"), member("README"), member("d", type=b"5")]
    )
    assert ids() == ["0/.hidden", "0/folder/.also", "0/./usual"]


def whole() -> bytes:
    return shard("0.tar", [one for i in range(6) for one in pair(f"{i}")]).read_bytes()


def test_a_damaged_header_anywhere_is_an_error():
    content = whole()
    expected = ids()
    assert len(expected) == 6
    with tarfile.open("0.tar") as tar:
        headers = [one.offset for one in tar.getmembers()]
    for number, offset in enumerate(headers):
        for damage in (b"\0" * 512, b"\xff" * 512, content[offset : offset + 3] + b"!" + content[offset + 4 :][:508]):
            Path("0.tar").write_bytes(content[:offset] + damage + content[offset + 512 :])
            with pytest.raises(UserError, match=r"0\.tar.* is damaged after \d images"):
                ids()
        assert number < 12


def test_a_shard_that_is_cut_off_anywhere_is_an_error():
    content = whole()
    end = len(content.rstrip(b"\0"))
    for length in [*range(0, end, 256), end, end + 100]:
        Path("0.tar").write_bytes(content[:length])
        if length // 512 * 512 > end:  # the mark of the end is there
            continue
        with pytest.raises(UserError, match=r"0\.tar.* is damaged after \d images"):
            ids()


def test_what_follows_the_end_is_an_error():
    content = whole()
    Path("0.tar").write_bytes(content + content)
    with pytest.raises(UserError, match="there is more after the mark of the end"):
        ids()


def test_the_index_says_what_is_missing():
    whole()
    Path("index.json").write_text(json.dumps({"counts": {"0.tar": 7}}))
    with pytest.raises(UserError, match=re.escape("'./0.tar' has 6 images, expected 7")):
        ids()
    Path("index.json").write_text(json.dumps({"counts": {"0.tar": 6}, "positions": True}))
    assert ids() == [0, 1, 2, 3, 4, 5]
    shard("0.tar", pair("x"))
    Path("index.json").write_text(json.dumps({"counts": {"0.tar": 1}, "positions": True}))
    with pytest.raises(UserError, match="expected a number as key"):
        ids()
