"""A small file server for the tests of downloads: ranges, broken connections, errors, and a log of the requests."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What is served, and how it misbehaves.

    `files` maps paths to contents; `breaks` maps paths to the numbers of bytes after which the next connections break;
    `status` maps paths to the error statuses of the next answers.
    """

    url: str
    files: dict[str, bytes]
    breaks: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    marks: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0


@contextmanager
def serve(files: dict[str, bytes]):
    """Serves `files` on this machine, as a `Server`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            with lock:
                here.requests.append((self.path, self.headers.get("Range")))
                here.at_once += 1
                here.most_at_once = max(here.most_at_once, here.at_once)
            try:
                self.answer()
            finally:
                with lock:
                    here.at_once -= 1

        def answer(self):
            content = here.files.get(self.path)
            error = here.status.get(self.path) or ([404] if content is None else [])
            if error or content is None:
                self.send_response(error.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            mark = f'"{hash(content)}"'
            start, asked = 0, self.headers.get("Range")
            if asked and here.ranges and self.headers.get("If-Range") in (None, mark):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if here.marks:
                self.send_header("ETag", mark)
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = here.breaks.get(self.path, [])
            self.wfile.write(content[start : start + stop[0]] if stop else content[start:])
            if stop:
                stop.pop(0)
                self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        here = Server(f"http://127.0.0.1:{server.server_address[1]}", files)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield here
        finally:
            server.shutdown()
            thread.join()
