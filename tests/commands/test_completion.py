"""The script does in bash what TAB would do."""

import subprocess

import pytest
import shtab

from lightning_diffclf.commands import COMMANDS
from lightning_diffclf.commands.completion import help_of, options_in, parser_of

SOME = ("completion", "configs", "demo", "evaluate", "fit", "report", "test")


@pytest.fixture(scope="module")
def script() -> str:
    return shtab.complete(parser_of(SOME), "bash")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("rep", {"report"}),
        ("fit --trainer.max_s", {"--trainer.max_steps"}),
        ("fit --samples.guidance", {"--samples.guidance_scale"}),
        ("demo --trainer.max_s", {"--trainer.max_steps"}),
        ("evaluate --keep", {"--keep-errors"}),
        ("fit --config dit_digit", {"dit_digits.yaml", "dit_digit_pairs.yaml", "dit_digit_triples.yaml"}),
        ("configs --copy sd_pe", {"sd_pets.yaml"}),
        ("fit --trainer.barebones tr", {"true"}),
        ("completion --", {"--help"}),
    ],
)
def test_what_tab_completes(script, typed, completed, tmp_path):
    words = ["diffclf", *typed.split()]
    ask = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_diffclf; printf '%s\\n' ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == completed


def test_every_option_of_the_help_is_there():
    """As counted in the lines of usage, which say it in another form."""
    for name in ("classify", "replay", "encode", "compare"):
        shown = help_of(name)
        usage = shown.partition("\n\n")[0]
        found = {option for one in options_in(shown) for option in one.names if not option.endswith("help")} - {"-h"}
        assert found == {word.strip("[]") for word in usage.split() if word.strip("[]").startswith("--")}, usage
    assert set(SOME) < set(COMMANDS)
