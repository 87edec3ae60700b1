"""Build the documentation's site: python scripts/make_docs.py (make docs). It is in build/docs/site then.

No network is needed, neither for building nor for reading it.

Pages are those of docs/, the results in benchmarks/, CHANGELOG.md and CONTRIBUTING.md, which are also read where they
are, on GitHub. They are gathered in one folder, where links between them become those of the site, and notebooks become
pages. A link to nothing, or to a name that the reference lacks, is an error.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

import lightning_diffclf
from lightning_diffclf.commands.configs import listing

CONFIGURATIONS = """`--config NAME` takes each of these by its name; several are laid on each other, left to right. One
file is one experiment, every value in it is also a flag, and `--print_config` shows what comes out. `diffclf configs
--copy NAME` writes one to edit; [layers](imagenet.md#layers) explains how files extend each other."""

ROOT = Path(__file__).resolve().parents[1]


def gather(pages: Path) -> None:
    """Write all pages to a folder, which must not be there."""
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("*.ipynb"))
    (pages / "benchmarks").mkdir()
    for path in (ROOT / "benchmarks").glob("*.md"):
        (pages / "benchmarks" / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (pages / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        text, resources = MarkdownExporter().from_filename(str(path))
        page = pages / "notebooks" / f"{path.stem}.md"
        for name, content in resources["outputs"].items():
            picture = page.with_name(f"{path.stem}_{name}")
            picture.write_bytes(content)
            text = text.replace(f"({name})", f"({picture.name})")
        page.write_text(text, encoding="utf-8")
    (pages / "configs.md").write_text(configurations(), encoding="utf-8")
    for path in pages.rglob("*.md"):
        path.write_text(linked(path.read_text(encoding="utf-8"), path.parent == pages), encoding="utf-8")


def configurations() -> str:
    """The page of all configurations: what ``diffclf configs`` says."""
    parts = ["# Configurations", CONFIGURATIONS]
    for title, group in listing().items():
        parts += [f"## {title}", "| name | what it is |\n| --- | --- |"]
        parts[-1] += "".join(f"\n| `{name}` | {text} |" for name, text in group.items())
    return "\n\n".join(parts) + "\n"


def linked(text: str, at_top: bool) -> str:
    """Links of a page of the repository as those of the site, whose top is docs/.

    >>> linked("[a](../benchmarks/a.md) [b](docs/b.md#c) [c](notebooks/c.ipynb) [d](d.md)", at_top=True)
    '[a](benchmarks/a.md) [b](b.md#c) [c](notebooks/c.md) [d](d.md)'
    >>> linked("[a](../docs/a.md) [b](../b.md)", at_top=False)
    '[a](../a.md) [b](../b.md)'
    """
    text = re.sub(r"\]\((?!http)([^)#]+)\.ipynb\)", r"](\1.md)", text)
    if at_top:
        return re.sub(r"\]\((?:\.\./|docs/)", "](", text)
    return text.replace("](../docs/", "](../")


def build(out: Path) -> Path:
    """The site, in a folder that is made anew.

    Raises:
        SystemExit: if a page, or what it links to, is missing; what the builder says is printed.
    """
    shutil.rmtree(out, ignore_errors=True)
    gather(out / "pages")
    for path in (ROOT / "zensical.toml", ROOT / "scripts" / "griffe_docstrings.py"):
        shutil.copy(path, out)
    package = Path(str(lightning_diffclf.__file__)).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "zensical.toml"]
    done = subprocess.run(
        command, cwd=out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        told = re.sub(r"\x1b\[[\d;]*m", "", done.stdout.partition("Traceback")[0])  # colours
        raise SystemExit(f"{told}\nerror: the site was not built")
    return out / "site"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="folder, which is made anew")
    print(f"open {build(parser.parse_args().out) / 'index.html'}")


if __name__ == "__main__":
    main()
