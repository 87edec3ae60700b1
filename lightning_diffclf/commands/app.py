"""``diffclf app``: a page that shows how a picture is decided."""

from __future__ import annotations

import asyncio
import signal
import sys
from importlib.util import find_spec

from jsonargparse import Namespace

from lightning_diffclf.errors import UserError
from lightning_diffclf.progress import described, listening


def app_command(given: Namespace) -> None:
    """``diffclf app``: loads the networks, and serves until it is told to end."""
    if find_spec("aiohttp") is None:
        raise UserError("app: aiohttp is not installed; pip install 'lightning-diffclf[app]'")
    if not 0 <= given.port < 65536:
        raise UserError(f"port: {given.port}, expected 0 to 65535")
    from lightning_diffclf.app.decision import scenes_of_digits
    from lightning_diffclf.app.networks import TINY, ClassConditional, Network, TextToImage
    from lightning_diffclf.app.server import make_app, serve

    networks: list[Network] = []
    with listening(lambda *stage: print(described(*stage), file=sys.stderr, flush=True)):
        networks += [ClassConditional(name, given.vae, given.device) for name in dict.fromkeys(given.ckpt)]
        for name in dict.fromkeys([*given.model, TINY]):
            networks.append(TextToImage(name, given.template, given.device, given.dtype, given.revision))
    app = make_app(networks, scenes_of_digits(), given.host)

    async def until_told() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signal_number, stop.set)
        ready = "open {} in a browser; Ctrl-C ends this"
        await serve(app, given.host, given.port, lambda address: print(ready.format(address), flush=True), stop)

    asyncio.run(until_told())
