"""``diffclf COMMAND …`` on N processes: what each printed; see tests/ranks.py."""

import io
from contextlib import redirect_stdout

from lightning_diffclf.cli import main
from tests.ranks import answer


def work(devices: int, *words: str) -> str:
    with redirect_stdout(io.StringIO()) as shown:
        main(list(words))
    return shown.getvalue()


if __name__ == "__main__":
    answer(work)
