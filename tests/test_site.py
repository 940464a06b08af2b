"""The site: it is built without a warning, and a browser shows its mathematics, tables and pictures at two widths."""

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("DOCS", ROOT / ".venv-docs")) / "bin" / "python"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no Sphinx: no {PYTHON}, which `make docs` makes"),
]

DESKTOP, PHONE = 1280, 390
HEIGHT = 500
SHOWN = [
    ("numerics", "mjx-container"),
    ("numerics", "table"),
    ("numerics", "img"),
    ("index", "table"),
    ("index", "img"),
]
SHOWN += [("api/rules", "mjx-container"), ("parity", "table"), ("wrong", "mjx-container")]
"""Pages, and what is to be seen on them; the last is a page that has all faults."""

WRONG = """<!doctype html><title>All faults</title><article><div style="width: 3000px">wide</div>
<span class="math">x</span><img src="none.png"><table></table></article>"""

LOOK = """<!doctype html><body style="margin: 0"><script>
const [frames, height] = FRAMES, found = [];
async function look(page, selector, width) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height, src: page + ".html"});
  frame.style = "border: 0; display: block";
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  const {document: seen, MathJax} = frame.contentWindow, root = seen.documentElement, images = [...seen.images];
  if (MathJax) await MathJax.startup.promise;
  for (const image of images) {
    image.loading = "eager";
    if (!image.complete) await new Promise(done => image.onload = image.onerror = done);
  }
  await seen.fonts.ready;
  const element = seen.querySelector("article " + selector);
  if (element) element.scrollIntoView({block: "center", behavior: "instant"});
  const box = element ? element.getBoundingClientRect() : {left: 0, top: 0, right: 0, bottom: 0};
  found.push({
    asked: seen.querySelectorAll(".math").length,
    typeset: seen.querySelectorAll("mjx-container").length,
    errors: seen.querySelectorAll("mjx-merror").length,
    missing: images.filter(image => !image.naturalWidth).length,
    sideways: root.scrollWidth - root.clientWidth,
    box: [box.left, box.top, Math.min(box.right, width), Math.min(box.bottom, height)],
  });
}
(async () => {
  for (const frame of frames) await look(...frame);
  const text = document.createElement("pre");
  text.id = "found";
  text.textContent = JSON.stringify(found);
  document.body.append(text);
})();
</script></body>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    command = [PYTHON, "-m", "sphinx", *options, "-d", folder / "trees", ROOT / "docs", folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_the_site_is_built_without_a_warning(site):
    page = (site / "api" / "rules.html").read_text()
    assert r"\theta_t" in page  # left to MathJax
    assert "References" in page
    assert "<img" in (site / "index.html").read_text()


def test_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        parts = re.findall(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=\"(https?:[^\"]*)\"", page.read_text())
        assert parts == [], page


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def seen(site, tmp_path_factory):
    """What a browser finds on each page at each width, and a picture of all of them, one below the other."""
    frames = [(page, selector, width) for page, selector in SHOWN for width in (DESKTOP, PHONE)]
    (site / "wrong.html").write_text(WRONG)
    (site / "look.html").write_text(LOOK.replace("FRAMES", json.dumps([frames, HEIGHT])))
    picture = tmp_path_factory.mktemp("seen") / "all.png"
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        size = f"--window-size={DESKTOP},{HEIGHT * len(frames)}"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        command += ["--virtual-time-budget=60000", f"--screenshot={picture}", "--dump-dom"]
        address = f"http://127.0.0.1:{server.server_port}/look.html"
        done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    return dict(zip(frames, json.loads(html.unescape(found[1])), strict=True)), matplotlib.image.imread(picture)


def faults(frame, seen):
    """What is wrong with a page, by what the browser has found and by the picture."""
    found, picture = seen
    page, top = found[frame], HEIGHT * list(found).index(frame)
    left, upper, right, lower = (int(x) for x in page["box"])
    part = picture[top + max(upper, 0) : top + lower, max(left, 0) : right, :3]
    is_drawn = part.size > 0 and np.mean(np.abs(part - part[0, 0]).max(axis=-1) > 0.1) > 0.005
    return {
        name
        for name, is_wrong in {
            "not typeset": page["typeset"] != page["asked"] or page["errors"],
            "a picture is missing": page["missing"],
            "moves sideways": page["sideways"],
            "not drawn": not is_drawn,
        }.items()
        if is_wrong
    }


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium to look at the site with")
@pytest.mark.parametrize("width", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize(("page", "selector"), SHOWN, ids=lambda x: x)
def test_a_browser_shows_mathematics_tables_and_pictures(page, selector, width, seen):
    found = faults((page, selector, width), seen)
    assert found == (
        {"not typeset", "a picture is missing", "moves sideways", "not drawn"} if page == "wrong" else set()
    )
