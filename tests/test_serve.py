"""The page of `infer.py --serve`: requests by hand, and a person's clicks in a real browser."""

import io
import json
import re
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import oracle
from PIL import Image

import infer
from lion_mini import Lion, toy
from lion_mini.serve import PAGE, Handler

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    lion, draw = Lion.from_pretrained("tiny"), lambda: toy.scene(7, "test").image
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, lion, draw, Lock())) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def png() -> bytes:
    toy.scene(7, "test").image.save(file := io.BytesIO(), "png")
    return file.getvalue()


def request(
    server: ThreadingHTTPServer, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read()


def ask(server: ThreadingHTTPServer, body: bytes, **asked: str) -> list[dict[str, Any]]:
    status, text = request(server, "POST", f"/answer?{urlencode(asked)}", body)
    assert status == 200
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_those_of_infer(server: ThreadingHTTPServer, png: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png)
    for mode, text in (("caption", ""), ("ask", "What is the ground?"), ("locate", "the large red circle")):
        [told] = ask(server, png, mode=mode, text=text)
        flags = [f"--{mode}", *([text] if text else []), "--out", str(tmp_path), "--dtype", "float32"]
        assert infer.main([str(tmp_path / "a.png"), *flags]) == 0
        line = json.loads((tmp_path / "results.jsonl").read_text())
        assert (told["text"], told["prompt"]) == (line["text"], line["prompt"])
        assert told["box"] == line["box"]
        assert told["explanation"]["tokens"][-1] == "</s>"
    [told] = ask(server, png, mode="describe", text="0.1,0.1,0.5,0.5")
    assert told["box"] == [0.1, 0.1, 0.5, 0.5]
    [told] = ask(server, png, mode="ask", text="What is the ground?", tags="red, brick")
    assert told["tags"] == [["red", 1.0], ["brick", 1.0]]
    assert told["text"] == "brick"
    assert ask(server, png, mode="caption", tags="")[0]["tags"] == []


@pytest.mark.parametrize(
    ("body", "asked", "sentence"),
    [
        (b"", {"mode": "caption"}, "this file: "),
        (b"no picture", {"mode": "caption"}, "this file: "),
        (None, {"mode": "rob"}, "mode 'rob': there are caption, ask, locate, describe"),
        (None, {}, "mode ''"),
        (None, {"mode": "ask", "text": "  "}, "say what you want to know"),
        (None, {"mode": "describe", "text": "1,2"}, "the box '1,2'"),
        (None, {"mode": "describe", "text": "0.5,0.5,0.1,0.1"}, "is inverted"),
        (None, {"mode": "describe", "text": "nan,0,1,1"}, "is inverted"),
        (None, {"mode": "ask", "text": "a <extra_id_0>"}, "soft prompt"),
        (None, {"mode": "ask", "text": "word " * 9000}, "tokens"),
    ],
)
def test_one_sentence(
    server: ThreadingHTTPServer, png: bytes, body: bytes | None, asked: dict[str, str], sentence: str
) -> None:
    [told] = ask(server, png if body is None else body, **asked)
    assert [*told] == ["error"]
    assert sentence in told["error"]
    assert "\n" not in told["error"]


def test_who_may_ask(server: ThreadingHTTPServer, png: bytes) -> None:
    port = server.server_address[1]
    assert server.server_address[0] == "127.0.0.1"
    for method, path in (("GET", "/"), ("POST", "/scene"), ("POST", "/answer?mode=caption")):
        for headers, status in (
            ({}, 200), ({"Host": f"localhost:{port}"}, 200), ({"Origin": f"http://127.0.0.1:{port}"}, 200),
            ({"Host": "evil.example"}, 403), ({"Host": f"evil.example:{port}"}, 403), ({"Host": "127.0.0.1"}, 403),
            ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
            ({"Origin": f"https://localhost:{port}"}, 403),
        ):  # fmt: skip
            assert request(server, method, path, png * (method == "POST"), headers)[0] == status, (path, headers)


@pytest.mark.parametrize(
    "path", ["/x", "/../README.md", "/page.html", "/%2e%2e/", "/?x", "/answer", "/assets/page.html"]
)
def test_nothing_else_can_be_had(server: ThreadingHTTPServer, path: str) -> None:
    assert request(server, "GET", path)[0] == 404
    assert request(server, "POST", f"/x{path}", b"1")[0] == 404
    assert request(server, "PUT", path, b"1")[0] == 501


def test_bodies_that_are_too_long_or_too_short(server: ThreadingHTTPServer, png: bytes) -> None:
    def raw(head: str, body: bytes = b"") -> bytes:
        with socket.create_connection(("127.0.0.1", port := server.server_address[1]), timeout=30) as connection:
            connection.sendall(
                f"POST /answer?mode=caption HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n{head}\r\n".encode() + body
            )
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    assert b" 413 " in raw("Content-Length: 20000001\r\n")
    for digits in (50, 5000):
        assert b" 413 " in raw(f"Content-Length: {'9' * digits}\r\n")
    assert b" 411 " in raw("")
    for length in ("-1", "1e3", "²", "x"):
        assert b" 411 " in raw(f"Content-Length: {length}\r\n")
    assert b"ended too soon" in raw("Content-Length: 1000\r\n", png[:500])
    assert b'"text"' in raw(f"Content-Length: {len(png)}\r\n", png)  # and it still answers


def test_people_who_go_away(server: ThreadingHTTPServer, png: bytes, capfd: pytest.CaptureFixture) -> None:
    """They close the connection before, in and after the request. Nobody else notices."""
    port = server.server_address[1]
    head = f"POST /answer?mode=caption HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(png)}\r\n\r\n"
    for sent in (b"", head.encode()[:30], head.encode() + png[:99], head.encode() + png, b"\xff\x00\r\n\r\n"):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a good-bye
        connection.sendall(sent)
        connection.close()
    assert ask(server, png, mode="caption")[-1]["text"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use(server: ThreadingHTTPServer, capsys: pytest.CaptureFixture) -> None:
    port = str(server.server_address[1])
    assert infer.main(["--serve", "--port", port]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"infer.py: --port {port}: Address already in use"


def test_ten_at_once(server: ThreadingHTTPServer, png: bytes) -> None:
    """They wait for each other, and are told so."""
    with ThreadPoolExecutor(10) as pool:
        told = [
            *pool.map(lambda i: ask(server, png, mode="ask", text=f"How many circles are there?{' ' * i}"), range(10))
        ]
    assert len({lines[-1]["text"] for lines in told}) == 1
    assert sum(lines[0] == {"waiting": True} for lines in told) >= 5
    assert all(len(lines) <= 2 for lines in told)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|<script src|<link (?!rel=\"icon\" href=\"data:,\")", text)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(server: ThreadingHTTPServer, tmp_path: Path, width: int) -> None:
    """Draw a scene, ask, edit the tags, locate, drag a box, look at a token's maps, and upload what is no picture."""
    api = oracle("playwright.sync_api")
    if CHROMIUM is None:
        oracle("chromium")
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    seen: list[str] = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        api.expect.set_options(timeout=30_000)
        see = lambda selector: api.expect(page.locator(selector))
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "blob:", "data:")) else seen.append(request.url),
        )
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#go")
        assert "First choose a picture" in page.inner_text("#status")
        page.click("#scene")
        page.wait_for_selector("#frame img")
        page.fill("#text", "What is the ground?")
        page.keyboard.press("Enter")
        see("#answer").to_have_text(re.compile("sand|grass|water|brick"))

        # Other tags, another answer.
        for ground in ("water", "brick"):
            while page.locator(".tag button").count():
                page.locator(".tag button").first.click()
            page.fill("#tag", ground)
            page.keyboard.press("Enter")
            page.click("#go")
            see("#answer").to_have_text(ground)
        page.click("#own")
        see(".tag").not_to_have_count(1)

        # A box, by words and by hand.
        page.click("text=Locate")
        page.fill("#text", "the large shape")
        page.click("#go")
        see("#answer").to_have_text(re.compile(r"\["))
        blank = page.evaluate("document.querySelector('#over').toDataURL()")
        page.select_option("#map", "t1")
        page.locator("#tokens button").nth(1).click()
        assert page.evaluate("document.querySelector('#over').toDataURL()") != blank
        assert page.locator("#shares tr").count() == 4
        page.select_option("#map", "")
        page.locator("#over").scroll_into_view_if_needed()
        area = page.locator("#over").bounding_box()
        page.mouse.move(area["x"] + 20, area["y"] + 20)
        page.mouse.down()
        page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2, steps=5)
        page.mouse.up()
        assert page.input_value("#text").count(",") == 3
        page.click("#go")
        see("#answer").to_have_text(re.compile("the "))
        page.focus("#over")
        before = page.input_value("#text")
        page.keyboard.press("ArrowRight")
        assert page.input_value("#text") != before
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        assert len(shot.getcolors(2**24) or ()) > 200
        assert page.evaluate("document.documentElement.scrollWidth") <= width

        # A dropped picture, and a pasted one.
        for kind, event, holder in (
            ("drop", "DragEvent", "dataTransfer"),
            ("paste", "ClipboardEvent", "clipboardData"),
        ):
            page.evaluate(
                """async ([kind, event, holder]) => {
                const files = new DataTransfer();
                files.items.add(new File([await (await fetch("/scene", {method: "POST"})).blob()], "a.png"));
                document.dispatchEvent(new window[event](kind, {[holder]: files, bubbles: true, cancelable: true}));
            }""",
                [kind, event, holder],
            )
            see("#status").to_contain_text("Ask, or choose")
            page.click("text=Caption")
            page.click("#go")
            see("#answer").to_have_text(re.compile("a "))

        # No picture.
        (tmp_path / "bad.png").write_bytes(b"no picture")
        page.set_input_files("#file", tmp_path / "bad.png")
        see("#status").to_contain_text("not a picture")
        assert not seen
        browser.close()
