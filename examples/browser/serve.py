"""Serve the browser example with an export, on this machine alone.

    loopexport onnx demo/SmolLM2-135M-Instruct-looped --steps 1,2,4,8     # once
    python examples/browser/serve.py demo/SmolLM2-135M-Instruct-looped

A second argument is a folder of npm packages, such as node_modules: with it, nothing is loaded from a CDN.
"""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Browsers give threads only to pages with these headers. The Space of README.md sends them too.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Handler(SimpleHTTPRequestHandler):
    """The page at `/`, the export at `/model/`, and the packages at `/packages/`."""

    extensions_map = {  # noqa: RUF012
        **SimpleHTTPRequestHandler.extensions_map,
        **{".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"},
    }

    def __init__(self, *args, folders):
        self.folders = folders
        super().__init__(*args)

    def translate_path(self, path):
        first, _, rest = path.lstrip("/").partition("/")
        is_named = f"/{first}/" in self.folders
        self.directory = str(self.folders[f"/{first}/" if is_named else "/"])
        return super().translate_path("/" + rest if is_named else path)

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


def make_server(export, packages=None, port=0):
    """A server on the loopback address; port 0 is any free one."""
    folders = {"/": Path(__file__).resolve().parent, "/model/": Path(export)}
    if packages is not None:
        folders["/packages/"] = Path(packages)
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, folders=folders))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    server = make_server(*sys.argv[1:])
    query = "?model=model/" + ("&library=packages/" if len(sys.argv) == 3 else "")
    print(f"http://localhost:{server.server_port}/{query}", flush=True)
    server.serve_forever()
