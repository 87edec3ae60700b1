"""The documentation's site is whole: no page, link or public name is missing, and nothing is loaded from elsewhere."""

import re
import sys
from pathlib import Path

import pytest

import lightning_diffclf
from lightning_diffclf.commands.configs import CONFIGS, summary
from scripts import griffe_docstrings, make_docs

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="zensical needs Python 3.11")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built strictly: what is not found ends it."""
    return make_docs.build(tmp_path_factory.mktemp("docs") / "build")


def test_every_page_is_in_the_navigation_and_was_built(site):
    listed = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text())
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    others = {"configs.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"}
    assert sorted(listed) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | notebooks | others)
    for page in listed:
        folder = Path(page).with_suffix("") if Path(page).name not in ("index.md", "README.md") else Path(page).parent
        assert (site / folder / "index.html").is_file(), page


def test_nothing_is_loaded_from_elsewhere(site):
    """No script, style, font or picture has an address of another host; links that are only followed may."""
    loaded = re.compile(
        r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
    )
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_the_reference_has_every_public_name(site):
    text = (site / "reference" / "index.html").read_text()
    for name in lightning_diffclf.__all__:
        assert f'id="lightning_diffclf.{name}"' in text, name
    assert ":class:" not in text
    assert "&gt;&gt;&gt; " not in re.sub(r"(?s)<pre.*?</pre>", "", text)  # examples are code


def test_all_configurations_are_listed(site):
    text = (site / "configs" / "index.html").read_text()
    for path in CONFIGS.glob("*.yaml"):
        assert f"<code>{path.name}</code>" in text
        assert summary(path)[:20].replace("&", "&amp;") in text


def test_links_are_those_of_the_site():
    page = "[a](../benchmarks/a.md) [b](docs/b.md#c) [c](notebooks/c.ipynb) [d](d.md) [e](https://f.g/h.ipynb)"
    expected = "[a](benchmarks/a.md) [b](b.md#c) [c](notebooks/c.md) [d](d.md) [e](https://f.g/h.ipynb)"
    assert make_docs.linked(page, at_top=True) == expected
    assert make_docs.linked("[a](../docs/a.md) [b](../b.md)", at_top=False) == "[a](../a.md) [b](../b.md)"


def test_roles_become_links_or_code():
    text = "See :class:`~.posterior.Posterior` and :meth:`predict`.\n\nExample:\n    >>> 1"
    expected = "See [`Posterior`][lightning_diffclf.Posterior] and `predict`.\n\nExamples:\n    >>> 1"
    assert griffe_docstrings.as_markdown(text) == expected


def test_what_is_not_found_ends_the_build(tmp_path, monkeypatch):
    """A page, a heading and a name of the reference, and nothing else."""
    for name in ("docs/index.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Page\n")
    (tmp_path / "docs" / "notebooks").mkdir()
    (tmp_path / "docs" / "imagenet.md").write_text("## Layers\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    settings = (ROOT / "zensical.toml").read_text()
    (tmp_path / "zensical.toml").write_text(re.sub(r"(?s)nav = \[.*?\n\]\n", 'nav = ["index.md"]\n', settings))
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    links = "[a](missing.md), [a](#missing), [a][lightning_diffclf.Missing]"
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{links}\n")
    with pytest.raises(
        SystemExit, match=r"(?s)page does not exist.*anchor does not exist.*unresolved autoref.*3 issues"
    ):
        make_docs.build(tmp_path / "broken")
