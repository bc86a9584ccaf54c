"""Look at a report page in headless Chromium: nothing asked, no error, figures that answer.

    python scripts/check_page.py outputs/demo/report.html [--axe] [--pictures FOLDER]

prints what is wrong and exits with 1, or says what was checked. --axe fetches axe-core with npm
into a temporary folder and runs it in light and dark, at a desktop's and a phone's width.
--pictures keeps screenshots of these four and the page as printed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AXE = "axe-core@4.14.1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOKS = [(theme, width) for theme in ("light", "dark") for width in (1280, 390)]
_SECONDS = 120


def find_browser() -> str | None:
    """Return the path of a Chromium or Chrome, None without one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium, driven through the pipes of its DevTools.

    Attributes:
        requests: What the page asked for, itself left out.
        errors: Its exceptions, and what the console or the browser complained of.
    """

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._number, self._rest, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the answer to one command of the DevTools protocol."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        for message in self._messages():
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
        raise RuntimeError("the browser has ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            *whole, self._rest = self._rest.split(b"\0")
            self._rest = b"\0".join([*whole[1:], self._rest]) if whole else self._rest
            if whole:
                message = json.loads(whole[0])
                self._note(message)
                yield message
                continue
            part = os.read(self._answers, 1 << 20)
            if not part:
                return
            self._rest += part

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(str([value.get("value") for value in params["args"]]))
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])

    def open(self, path: Path) -> None:
        """Load a file."""
        url = path.resolve().as_uri()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + _SECONDS
        while self.run("document.readyState") != "complete" or self.run("location.href") != url:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path} did not load")
            time.sleep(0.05)
        self.requests.remove(url)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page, waited for if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def look(self, theme: str, width: int, height: int = 900) -> None:
        """Show the page in a theme, "light" or "dark", and a window of that size."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Send a mouse event at a place of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def picture(self, path: Path) -> None:
        """Save the whole page as it is shown."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def printed(self) -> bytes:
        """Return the page as a PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])


@contextmanager
def browsing(browser: str) -> Iterator[Browser]:
    """Start a browser, and end it."""
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", "--remote-debugging-pipe"),
        ]
        # The protocol speaks on descriptors 3 and 4.
        start = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", start, "bash", str(to_read), str(to_write), browser, *arguments],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(process, commands, answers)
        finally:
            os.close(commands)  # upon which it ends
            os.close(answers)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# In the page: what a figure shows now.
_HELPERS = """
var figures = [...document.querySelectorAll('figure')].filter((f) => f.querySelector('.plot'));
var state = (figure) => ({
  ticks: figure.querySelector('.ticks').innerHTML,
  matrix: figure.querySelector('.line').getAttribute('transform'),
  off: [...figure.querySelectorAll('.curve.off')].map((c) => c.dataset.algorithm),
  readout: figure.querySelector('.readout').textContent,
});
"""


def check(page: Browser) -> list[str]:
    """Return what is wrong with the page that is open: its figures, its switches, its width."""
    wrong = []

    def expect(holds: bool, message: str) -> None:
        if not holds:
            wrong.append(message)

    page.look("light", 1280)
    page.run(_HELPERS)
    number = page.run("figures.length")
    expect(number > 0, "no figure has curves")
    if not number:
        return wrong
    if page.run("figures[0].querySelector('.readout') === null"):
        return [*wrong, f"the page's script does not run: {page.errors}"]
    first = "state(figures[0])"
    begun = page.run(f"figures[0].scrollIntoView({{block: 'center'}}), {first}")

    switches = page.run("document.querySelectorAll('.legend button').length")
    for place in range(switches):
        switch = f"document.querySelectorAll('.legend button')[{place}]"
        name = page.run(f"{switch}.focus(), {switch}.textContent.trim()")
        page.press(" ")
        off = page.run("figures.flatMap((f) => state(f).off)")
        own = f"`[data-algorithm=${{CSS.escape({json.dumps(name)})}}]`"
        drawn = page.run(f"figures.some((f) => f.querySelector({own}))")
        expect(set(off) == ({name} if drawn else set()), f"the switch of {name} hides {set(off)}")
        expect(page.run(f"{switch}.ariaPressed") == "false", f"the switch of {name} looks pressed")
        page.press(" ")
    expect(page.run(first) == begun, "a figure is another one after all switches went off and on")

    page.run("figures[0].querySelector('.stage').focus()")
    page.press("ArrowRight")
    left = page.run(first)["readout"]
    page.press("End")
    right = page.run(first)["readout"]
    expect(bool(left) and bool(right) and left != right, f"arrow keys read {left!r}, {right!r}")
    page.press("+")
    expect(page.run(first)["matrix"] != begun["matrix"], "the key + does not zoom")
    page.press("0")
    expect(page.run(first) == begun, "the key 0 does not show the whole curve again")

    box = page.run(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(figures[0].querySelector('.plot').getBoundingClientRect())"
    )
    x, y, width, height = box
    middle = y + height / 2
    page.mouse("mouseMoved", x + width * 0.6, middle)
    expect(bool(page.run(first)["readout"]), "the mouse reads nothing")
    page.mouse("mousePressed", x + width * 0.3, middle, button="left", clickCount=1)
    page.mouse("mouseMoved", x + width * 0.7, middle, button="left", buttons=1)
    page.mouse("mouseReleased", x + width * 0.7, middle, button="left", clickCount=1)
    expect(page.run(first)["matrix"] != begun["matrix"], "dragging does not zoom")
    page.run("figures[0].querySelector('.tools button:last-child').click()")
    page.mouse("mouseMoved", 1, 1)
    expect(page.run(first) == begun, "the button All does not show the whole curve again")

    for theme, width in LOOKS:
        page.look(theme, width)
        wide = page.run("document.documentElement.scrollWidth")
        expect(wide <= width, f"at {width} pixels the page is {wide} wide")
    expect(page.printed().startswith(b"%PDF"), "the page does not print")
    expect(not page.requests, f"the page asked for {page.requests}")
    expect(not page.errors, f"the console has {page.errors}")
    return wrong


def violations(page: Browser, axe: str) -> list[str]:
    """Return what axe-core finds in the page that is open, in each of the looks."""
    found = []
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.run(f"{axe}; 0")
    for theme, width in LOOKS:
        page.look(theme, width)
        results = page.run(
            "axe.run().then((r) => r.violations.map((v) => "
            "[v.id, v.help, v.nodes.length, v.nodes[0].html.slice(0, 160)]))"
        )
        found += [f"axe, {theme}, {width} pixels: {rule}" for rule in map(str, results)]
    return found


def fetch_axe(folder: Path) -> str:
    """Return axe-core's script, fetched with npm into a folder."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True, text=True
    )
    shutil.unpack_archive(folder / packed.stdout.strip().splitlines()[-1], folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


def main() -> int:
    """Check one page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--axe", action="store_true", help="fetch axe-core and run it")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots and a PDF")
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed: install Chromium")
    with browsing(browser) as page:
        page.open(arguments.page)
        wrong = check(page)
        if arguments.axe:
            with tempfile.TemporaryDirectory() as folder:
                wrong += violations(page, fetch_axe(Path(folder)))
            page.open(arguments.page)
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            for theme, width in LOOKS:
                page.look(theme, width)
                page.picture(arguments.pictures / f"{theme}-{width}.png")
            (arguments.pictures / "printed.pdf").write_bytes(page.printed())
    done = "console, requests, switches, keys, mouse, widths, print"
    print("\n".join(wrong) if wrong else f"good: {done}{', axe-core' if arguments.axe else ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
