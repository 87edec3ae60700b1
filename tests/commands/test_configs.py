"""``diffclf configs``: what comes with the package."""

import pytest

from lightning_diffclf.commands import main
from lightning_diffclf.commands.configs import CONFIGS, LAYER, find, summary

NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
OTHER = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*"))


def test_all_are_listed_with_a_line_each(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted([*NAMES, *OTHER])
    assert {"dit_digits.yaml", "sd_digits.yaml"} <= set(listed[: listed.index("compile.yaml")])
    assert {"likelihood_ratio.yaml"} <= set(listed[listed.index("compile.yaml") :])


WITH_RUN_DIR = {  # layers that are networks
    *("clip.yaml", "dit_256.yaml", "dit_512.yaml", "timm.yaml"),
    *("sit_256.yaml", "repa_256.yaml", "lightningdit_256.yaml", "edm2_512.yaml"),
}


@pytest.mark.parametrize("name", OTHER)
def test_others_say_what_they_are(name):
    assert 20 < len(summary(CONFIGS / name).partition(". ")[0]) <= 130


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_says_what_it_is(name):
    text = summary(CONFIGS / name)
    assert text.endswith(".")
    assert 20 < len(text) <= 130
    assert "python" not in text
    # what cannot stand alone says so
    assert text.startswith(LAYER) == ("run_dir:" not in (CONFIGS / name).read_text() or name in WITH_RUN_DIR)


def test_a_copy_is_the_file_and_comes_before_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["configs", "--copy", "dit_digits.yaml"])
    assert "dit_digits.yaml: edit it" in capsys.readouterr().out
    assert (tmp_path / "dit_digits.yaml").read_bytes() == (CONFIGS / "dit_digits.yaml").read_bytes()
    assert find("dit_digits.yaml").resolve() == tmp_path / "dit_digits.yaml"
    main(["configs", "--copy", "sd_digits.yaml", "--out", "mine.yaml"])
    assert (tmp_path / "mine.yaml").is_file()
    main(["configs", "--copy", "slurm/suite_array.sbatch"])
    main(["configs", "--copy", "suites/digits.yaml", "--out", "suite.yaml"])
    printed = capsys.readouterr().out
    assert "suite_array.sbatch: edit it, then sbatch suite_array.sbatch" in printed
    assert "suite.yaml: edit it, then diffclf suite suite.yaml" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--copy=dit_digit.yaml"],
            "no configuration 'dit_digit.yaml', expected one of clip.yaml, .*dit_digits.yaml",
        ),
        (["--copy=../pyproject.toml"], "no configuration"),
        (["--copy=dit_digits.yaml", "--out=there.yaml"], "out: 'there.yaml' is there already"),
        (["--copy=dit_digits.yaml", "--out=nowhere/a.yaml"], "out: 'nowhere/a.yaml' cannot be written"),
    ],
)
def test_copies_that_cannot_be_made(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["configs", *flags])
    assert (tmp_path / "there.yaml").read_text() == "mine"
