"""Files of the Hub by name; nothing is downloaded here."""

from pathlib import Path

import huggingface_hub
import pytest

from lightning_diffclf.hub import local_file


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def download(repository, file=None, *, revision=None, allow_patterns=None):
        asked.append((repository, file, revision))
        if repository == "who/gated":
            raise OSError("Access is restricted\nsecond line")
        return f"/cache/{repository}/{file or ''}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://nyu-visionx/SiT-collections/SiT-XL-2-256.pt", ("nyu-visionx/SiT-collections", "SiT-XL-2-256.pt", None)),
        ("hf://REPA-E/sit-repae-vavae@v1.0/a/0400000.pt", ("REPA-E/sit-repae-vavae", "a/0400000.pt", "v1.0")),
        ("hf://facebook/DiT-XL-2-256", ("facebook/DiT-XL-2-256", None, None)),
        ("hf://facebook/DiT-XL-2-256@main", ("facebook/DiT-XL-2-256", None, "main")),
    ],
)
def test_what_is_asked_of_the_hub(name, asked, hub):
    assert local_file(name) == Path(f"/cache/{asked[0]}/{asked[1] or ''}")
    assert hub == [asked]


def test_anything_else_is_a_path(hub):
    assert local_file("who/what/file.pt") == Path("who/what/file.pt")
    assert local_file(Path("there")) == Path("there")
    assert hub == []


@pytest.mark.parametrize("name", ["hf://one", "hf://", "hf://a/b@/c", "hf://a b/c/d"])
def test_addresses_that_are_none(name, hub):
    with pytest.raises(ValueError, match="expected hf://OWNER/REPOSITORY/FILE"):
        local_file(name)
    assert hub == []


def test_what_the_hub_does_not_give(hub):
    with pytest.raises(FileNotFoundError, match=r"did not give 'hf://who/gated/x.pt' \(Access is restricted\)"):
        local_file("hf://who/gated/x.pt")
