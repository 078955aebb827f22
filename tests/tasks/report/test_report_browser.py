"""The report in headless Chromium: it renders without errors and without requests."""

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
# A window cannot be as narrow as a phone, but a frame can.
PHONE = """<!DOCTYPE html><html><body><iframe src="/page.html" width="390" height="800"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {
  const inner = event.target.contentDocument.documentElement;
  document.documentElement.dataset.widths = [inner.clientWidth, inner.scrollWidth];
};
</script></body></html>"""


@dataclass(frozen=True)
class Seen:
    """The browser's view of a page.

    Attributes:
        page: the document after it was rendered.
        console: what the browser logged about it.
        requests: host and path of all requests, to any host.
    """

    page: Page
    console: list[str]
    requests: list[tuple[str, str]]


Open = Callable[..., Seen]


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Open]:
    """Open a page in a browser that resolves every host to a test server."""
    served: dict[str, bytes] = {}
    requests: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # The browser's own requests have no referrer.
            if self.headers.get("Host") == HOST or self.headers.get("Referer"):
                requests.append((self.headers.get("Host", ""), self.path))
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
        return Seen(Page(done.stdout), console, list(requests))

    yield visit
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_browser_reports_errors_and_requests(browse: Open) -> None:
    html = (
        "<!DOCTYPE html><html><head></head><body><img src='http://elsewhere.example/x.png'>"
        "<script>console.error('oh')</script></body></html>"
    )
    seen = browse(html)
    assert ("elsewhere.example", "/x.png") in seen.requests
    assert any("oh" in line for line in seen.console)


@pytest.mark.parametrize("make", [data.report_input, data.hostile_input, data.bare_input])
def test_the_page_renders_without_errors_or_requests(
    browse: Open, make: Callable[[], ReportInput]
) -> None:
    found = make()
    report = render(found)
    seen = browse(report.html)
    assert seen.console == []
    assert seen.requests == [(HOST, "/page.html")]
    # The rendered document has the numbers of the JSON and every plot.
    known, drawn = leaves(found), list(seen.page.numbers)
    assert drawn == list(Page(report.html).numbers)
    assert all(json.dumps(known[field]) == value for field, value in drawn)
    assert len(seen.page.all("svg")) == len(report.plots)
    assert len(seen.page.all("table")) == report.html.count("<table>")


@pytest.mark.parametrize("make", [data.report_input, data.hostile_input])
def test_the_page_fits_the_width_of_a_phone(browse: Open, make: Callable[[], ReportInput]) -> None:
    seen = browse(render(make()).html, around=PHONE)
    [document] = seen.page.all("html")
    inside, needed = map(int, str(document["data-widths"]).split(","))
    assert 370 <= inside <= 390, "with or without a scroll bar"
    assert needed == inside
