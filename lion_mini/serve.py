"""`python infer.py --serve`: a page in the browser to ask LION, and to see where its answers come from.

    GET  /                                      the page, assets/page.html
    POST /scene                                 a new scene of the toy world, as PNG
    POST /answer?mode=ask&text=...&tags=a, b    lines of JSON about the picture in the body: {"waiting": true} while
                                                another request is answered, then the answer or {"error": "a sentence"}

For the browser on this machine alone: the server listens on 127.0.0.1, refuses other hosts' names and other pages'
requests, and opens no path that a request names.
"""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from PIL.Image import Image

from .box import Box
from .data.records import split_tags
from .explain import explain
from .files import printable, reading
from .images import open_image
from .model.generate import GENERATION
from .pipeline import Lion
from .text.prompts import DECODING, KIND, TASK_OF, render

PAGE = Path(__file__).parent / "assets" / "page.html"
LIMIT = 20 * 10**6  # bytes of a picture
POLICY = "default-src 'self' 'unsafe-inline' data: blob:"  # nothing from elsewhere


def answer(lion: Lion, body: bytes, asked: dict[str, str]) -> dict[str, Any]:
    """What the page shows. A ValueError says in a sentence what is wrong with the picture or the question."""
    mode, text = asked.get("mode", ""), asked.get("text", "").strip()
    if mode not in KIND:
        raise ValueError(f"mode {mode!r}: there are {', '.join(KIND)}")
    if mode in ("ask", "locate") and not text:
        raise ValueError("say what you want to know")
    with reading("this file"):
        image = open_image(io.BytesIO(body))
    box = None
    if mode == "describe":
        with reading(f"the box {text!r}: expected four fractions, x1,y1,x2,y2"):
            box = Box.checked(*map(float, text.split(",")))
    kind = KIND[mode]
    question = render(lion.instruction(kind), question=text, expression=text, box=box or "")
    tags = [split_tags(asked["tags"])] if "tags" in asked and lion.config.tags != "none" else None
    this = explain(lion, image, question, TASK_OF[kind], GENERATION[DECODING[kind]], tags)
    found = Box.parse(this.answer.text) if mode == "locate" else box
    return {
        "text": this.answer.text, "prompt": this.answer.prompt, "score": this.answer.score, "tags": this.answer.tags,
        "box": found and astuple(found), "explanation": this.to_json(),
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request. The whole of its body is read before it waits for the model."""

    timeout = 20  # seconds without a byte

    def __init__(self, lion: Lion, draw: Callable[[], Image], lock: Lock, *rest: Any):
        self.lion, self.draw, self.lock = lion, draw, lock
        super().__init__(*rest)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the tab was closed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        print(printable(format % args))

    def refused(self) -> bool:
        """Answer requests that come from elsewhere: a page of another origin, or another name of this address."""
        port = self.connection.getsockname()[1]
        here = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in here and (origin is None or origin in [f"http://{name}" for name in here]):
            return False
        self.say(403, {"error": f"this server answers {' and '.join(here)} alone"})
        return True

    def start(self, status: int, kind: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, kind: str, body: bytes, status: int = 200) -> None:
        self.start(status, kind)
        self.wfile.write(body)

    def say(self, status: int, what: dict[str, Any]) -> None:
        self.reply("application/json", json.dumps(what).encode(), status)

    def do_GET(self) -> None:
        if not self.refused():
            if self.path == "/":
                self.reply("text/html; charset=utf-8", PAGE.read_bytes())
            else:
                self.say(404, {"error": "there is only /"})

    def do_POST(self) -> None:
        where = urlsplit(self.path)
        if self.refused():
            return
        # 1. The body, whole.
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return self.say(411, {"error": "Content-Length is missing"})
        if len(length) > 8 or int(length) > LIMIT:  # Python refuses to read 5,000 digits
            return self.say(413, {"error": f"this picture has over {LIMIT // 10**6} MB: make it smaller"})
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return self.say(400, {"error": "the request ended too soon"})
        # 2. A scene, or an answer as soon as the model is free.
        if where.path == "/scene":
            self.draw().save(png := io.BytesIO(), "png")
            return self.reply("image/png", png.getvalue())
        if where.path != "/answer":
            return self.say(404, {"error": "there are only /scene and /answer"})
        self.start(200, "application/x-ndjson")
        line = lambda what: self.wfile.write(json.dumps(what).encode() + b"\n")
        if not self.lock.acquire(blocking=False):
            line({"waiting": True})
            self.lock.acquire()
        try:
            line(answer(self.lion, body, dict(parse_qsl(where.query, keep_blank_values=True))))
        except (ValueError, RuntimeError) as error:  # PyTorch's, out of memory for instance
            line({"error": str(error)})
        finally:
            self.lock.release()


def serve(lion: Lion, draw: Callable[[], Image], port: int) -> int:
    """Answer until Ctrl-C. `draw` makes a new scene."""
    with reading(f"--port {port}"):
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, lion, draw, Lock()))
    with server:
        print(f"http://127.0.0.1:{server.server_address[1]}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0
