"""The page and what it asks for, over HTTP: from this machine, and from nowhere else unless that is asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from lightning_diffclf.app.decision import Event, Question, decide
from lightning_diffclf.app.networks import RULES, Network
from lightning_diffclf.errors import UserError, first_line
from lightning_diffclf.zero_shot import MAX_BYTES

PAGE = {
    "/": ("index.html", "text/html"),
    "/app.css": ("app.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/falls.js": ("falls.js", "text/javascript"),
}

LOOPBACK = ("127.0.0.1", "localhost", "::1")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

logger = logging.getLogger(__name__)


class Left(Exception):
    """Whoever asked is gone."""


class Desk:
    """Decides one question after the other, in the order in which they were asked, on a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "decisions")
        self._asked: list[Callable[[Event], None]] = []  # of the questions without an answer yet, in their order

    async def answer(self, work: Callable[[Callable[[Event], None]], None]) -> AsyncGenerator[Event, None]:
        """What ``work`` tells; closing the iterator ends it at the next thing that it tells."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        left = threading.Event()

        def tell(event: Event | None) -> None:
            if left.is_set():
                raise Left
            loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                tell({"kind": "begun"})
                work(tell)
                tell(None)
            except Left:
                pass  # as it should
            except UserError as error:
                tell({"kind": "refused", "message": str(error)})
                tell(None)
            except Exception as error:
                logger.exception("a decision failed")
                tell({"kind": "refused", "message": f"failed: {first_line(error)}; the terminal says more"})
                tell(None)

        self._asked.append(events.put_nowait)
        job = self._thread.submit(run)
        try:
            self._say_who_waits()
            while (event := await events.get()) is not None:
                yield event
        finally:
            left.set()
            job.cancel()  # if it has not begun
            self._asked.remove(events.put_nowait)
            self._say_who_waits()

    def _say_who_waits(self) -> None:
        for before, tell in enumerate(self._asked):
            if before:
                tell({"kind": "waiting", "before": before})

    def close(self) -> None:
        """Begin no further question."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def make_app(networks: Sequence[Network], examples: Sequence[bytes] = (), host: str = LOOPBACK[0]) -> web.Application:
    """The page for some networks.

    Args:
        networks: The menu; the first one is chosen at first.
        examples: PNG files to try networks of digits with.
        host: Where it will be served.
    """
    by_name = {one.name: one for one in networks}
    desk = Desk()

    @web.middleware
    async def guarded(request: web.Request, handler: Any) -> web.StreamResponse:
        _check_sender(request, host)
        response: web.StreamResponse = await handler(request)
        return response

    async def page(request: web.Request) -> web.Response:
        name, kind = PAGE[request.path]
        text = (files("lightning_diffclf.app") / "page" / name).read_text(encoding="utf-8")
        return web.Response(text=text, content_type=kind)

    async def offer(request: web.Request) -> web.Response:
        return web.json_response(
            {"networks": list(map(_described, networks)), "rules": RULES, "examples": len(examples)}
        )

    async def example(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if number >= len(examples):
            raise web.HTTPNotFound
        return web.Response(body=examples[number], content_type="image/png")

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "application/x-ndjson"
        try:
            network, question = await _question(request, by_name)
        except UserError as error:
            return web.json_response({"kind": "refused", "message": str(error)}, status=400)
        await response.prepare(request)
        async with aclosing(desk.answer(lambda tell: decide(network, question, tell))) as events:
            async for event in events:
                await response.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        return response

    async def headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)

    async def close(app: web.Application) -> None:
        desk.close()

    app = web.Application(middlewares=[guarded], client_max_size=MAX_BYTES)
    app.on_response_prepare.append(headers)
    app.on_cleanup.append(close)
    app.add_routes([web.get(path, page) for path in PAGE])
    app.add_routes([web.get("/offer", offer), web.get(r"/examples/{number:\d{1,4}}.png", example)])
    app.add_routes([web.post("/decide", answer)])
    return app


def _check_sender(request: web.Request, host: str) -> None:
    """Refuse what other sites make a browser send: under a name of theirs for this machine, or from their pages."""
    named = urlsplit(f"//{request.host}").hostname
    origin = request.headers.get("Origin")
    if host in LOOPBACK and named not in LOOPBACK:
        raise web.HTTPForbidden(text=f"host: {named!r}, expected one of {LOOPBACK}")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(text=f"origin: {origin!r}, expected this page")


def _described(network: Network) -> dict[str, Any]:
    digits = network.size[0] == 8  # a network that sees so little was trained on those
    about = {"name": network.name, "kind": network.kind, "labels": list(network.labels), "digits": digits}
    return about | {"fixed": network.classes is not None}


async def _question(request: web.Request, networks: Mapping[str, Network]) -> tuple[Network, Question]:
    """What a form asks; raises ValueError if something is missing."""
    try:
        form = await request.post()
    except web.HTTPRequestEntityTooLarge as error:
        raise UserError(f"picture: more than {MAX_BYTES:,} bytes") from error
    except ValueError as error:
        raise UserError(f"form: cannot be read ({first_line(error)})") from error
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    name, draws, picture = texts.get("network", ""), texts.get("draws", ""), form.get("picture")
    if name not in networks:
        raise UserError(f"network: {name!r}, expected one of {list(networks)}")
    if not (draws.isascii() and draws.isdecimal() and len(draws) < 9):
        raise UserError(f"draws: {draws!r}, expected a whole number")
    content = picture.file.read() if isinstance(picture, web.FileField) else b""
    question = Question(content, texts.get("labels", ""), texts.get("rule", ""), int(draws), "error_map" in texts)
    return networks[name], question


async def serve(app: web.Application, host: str, port: int, ready: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serve until ``stop``; ``ready`` is told the address.

    Raises:
        ValueError: if the address cannot be had.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise UserError(f"port: {port} of {host!r} cannot be had ({first_line(error)}); try --port 0") from error
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()
