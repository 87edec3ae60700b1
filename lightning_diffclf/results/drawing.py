"""Charts as pictures, drawn by a process of its own.

The engine that draws, V8, holds Python's lock meanwhile, so that nothing happens beside it in one process, and keeps
80 MB of memory.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

SCALE = 2  # pixels of a PNG for one of a chart

# Modules are those of this process, and none of the folder in which it runs, which may be that of a run of others.
PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lightning_diffclf.results import drawing
drawing.main()
"""


def svg(chart: str) -> str:
    """A chart, as Vega-Lite has it in JSON, as SVG."""
    import vl_convert  # here: where another process draws, its library need not be in memory

    return str(vl_convert.vegalite_to_svg(chart))


def png(drawn: str) -> bytes:
    """An SVG as PNG."""
    import vl_convert

    return bytes(vl_convert.svg_to_png(drawn, scale=SCALE))


def pictures(charts: Mapping[str, str]) -> dict[str, tuple[str, bytes]]:
    """Each of some charts, as Vega-Lite has it in JSON, as SVG and PNG; drawn beside this process.

    Raises:
        ValueError: if a chart cannot be drawn.
    """
    # Where it was told to end, as a scheduler tells all processes of a job, or what is wrong with a chart: drawn here.
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        found = subprocess.run(
            [sys.executable, "-I", "-c", PROGRAM, json.dumps(sys.path)],
            input=json.dumps(charts).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        ).stdout
        return {name: (drawn, base64.b64decode(pixels)) for name, (drawn, pixels) in json.loads(found).items()}
    return _draw(charts)


def _draw(charts: Mapping[str, str]) -> dict[str, tuple[str, bytes]]:
    drawn = {name: svg(chart) for name, chart in charts.items()}
    return {name: (one, png(one)) for name, one in drawn.items()}


def main() -> None:
    """Draw the charts of the standard input, by name, and write them to the standard output."""
    found = _draw(json.load(sys.stdin))
    json.dump({name: (drawn, base64.b64encode(pixels).decode()) for name, (drawn, pixels) in found.items()}, sys.stdout)
