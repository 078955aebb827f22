"""The report in headless Chromium: it renders, says no error and asks nobody for anything."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from restitch.tasks.report import ReportInput, render
from tests.tasks import report_data as data
from tests.tasks.report.test_report import Page, leaves

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed; on Debian: apt-get install chromium"
)
HOST = "report.example"
# No window is as narrow as a phone, but a frame can be.
PHONE = """<!DOCTYPE html><html><body><iframe src="/page.html" width="390" height="800"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {
  const inner = event.target.contentDocument.documentElement;
  document.documentElement.dataset.widths = [inner.clientWidth, inner.scrollWidth];
};
</script></body></html>"""


@dataclass(frozen=True)
class Seen:
    """What became of a page.

    Attributes:
        page: the document after it was rendered.
        console: what the browser logged about it.
        requests: host and path of everything that was asked for, of any host.
    """

    page: Page
    console: list[str]
    requests: list[tuple[str, str]]


Open = Callable[..., Seen]


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Open]:
    """Open a page in a browser for which every host in the world is one server of ours."""
    served: dict[str, bytes] = {}
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # The browser asks for things of its own, but never in a page's name.
            if self.headers.get("Host") == HOST or self.headers.get("Referer"):
                asked.append((self.headers.get("Host", ""), self.path))
            body = served.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """The browser's own requests are encrypted, which this server does not speak."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def visit(html: str, around: str = "") -> Seen:
        served.update({"/page.html": html.encode(), "/around.html": around.encode()})
        command = [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--log-level=0"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_port}",
            "--disable-features=NetworkTimeServiceQuerying",
            "--window-size=1200,900",
            "--dump-dom",
            f"http://{HOST}/{'around' if around else 'page'}.html",
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Seen(Page(done.stdout), console, list(asked))

    yield visit
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_looked_for_would_be_found(browse: Open) -> None:
    html = (
        "<!DOCTYPE html><html><head></head><body><img src='http://elsewhere.example/x.png'>"
        "<script>console.error('oh')</script></body></html>"
    )
    seen = browse(html)
    assert ("elsewhere.example", "/x.png") in seen.requests
    assert any("oh" in line for line in seen.console)


@pytest.mark.parametrize("make", [data.report_input, data.hostile_input, data.bare_input])
def test_it_renders_without_an_error_or_a_request(
    browse: Open, make: Callable[[], ReportInput]
) -> None:
    found = make()
    report = render(found)
    seen = browse(report.html)
    assert seen.console == []
    assert seen.requests == [(HOST, "/page.html")]
    # The document that the browser made holds the very numbers of the JSON, and every plot.
    known, drawn = leaves(found), list(seen.page.numbers)
    assert drawn == list(Page(report.html).numbers)
    assert all(json.dumps(known[field]) == value for field, value in drawn)
    assert len(seen.page.all("svg")) == len(report.plots)
    assert len(seen.page.all("table")) == report.html.count("<table>")


@pytest.mark.parametrize("make", [data.report_input, data.hostile_input])
def test_a_phone_need_not_scroll_sideways(browse: Open, make: Callable[[], ReportInput]) -> None:
    seen = browse(render(make()).html, around=PHONE)
    [document] = seen.page.all("html")
    inside, needed = map(int, str(document["data-widths"]).split(","))
    assert 370 <= inside <= 390, "with or without the bar for scrolling"
    assert needed == inside
