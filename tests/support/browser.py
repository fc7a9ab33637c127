"""Shows pages of `examples/browser` in headless Chromium, and tells what they show."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
SECONDS = 120

# A page on the same server that uses the example in a frame as a person would, and posts what it saw.
DRIVER = """<!doctype html><iframe style="width: 800px; height: 600px"></iframe><script>
const pause = () => new Promise((resolve) => setTimeout(resolve, 20));
async function use({ model, format, slider, prompt, limit }) {
  const frame = document.querySelector("iframe");
  const loaded = new Promise((resolve) => (frame.onload = resolve));
  frame.src = `/index.html?library=packages/&model=${encodeURIComponent(model)}`;
  await loaded;
  const $ = (id) => frame.contentDocument.getElementById(id);
  while ($("form").hidden && $("error").hidden) await pause();
  if (!$("form").hidden) {
    $("format").value = format;
    $("format").dispatchEvent(new Event("change"));
    Object.entries({ prompt, limit, steps: slider }).forEach(([id, value]) => ($(id).value = value));
    $("steps").dispatchEvent(new Event("input"));
    $("ask").click();
    while ($("ask").disabled) await pause();
  }
  const tokens = (side) => ($(side).dataset.tokens ?? "").split(" ").filter(Boolean).map(Number);
  return {
    base: tokens("base"), loop: tokens("loop"), loop_steps: $("loop-k").textContent, error: $("error").textContent,
    can_choose: !$("choose").hidden,
  };
}
(async () => {
  for (const scene of SCENES) {
    const seen = await use(scene).catch((error) => ({ error: String(error) }));
    await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
  }
})();
</script>"""


def show_pages(chromium, handler, folders, packages, scenes) -> list[dict]:
    """Use the page once for each scene, in one browser.

    Args:
        chromium: the browser's path.
        handler: the handler of the example's server.
        folders: directory of each folder of the server.
        packages: folder of npm packages.
        scenes: which model to open, and what to ask.

    Returns:
        What each scene showed: tokens of both sides, K of the loop, the error.
    """
    seen: queue.Queue[dict] = queue.Queue()
    driver = DRIVER.replace("SCENES", json.dumps(scenes)).encode()

    class Driven(handler):
        def do_GET(self):  # noqa: N802
            if self.path != "/driver":
                return super().do_GET()
            self.answer(driver)

        def do_POST(self):  # noqa: N802
            seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(b"")

        def answer(self, content):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    folders = {**folders, "/packages/": Path(packages)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Driven, folders=folders))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *OPTIONS, f"--user-data-dir={profile}", f"http://localhost:{server.server_port}/driver"]
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return [seen.get(timeout=SECONDS) for _ in scenes]
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()
            server.server_close()
