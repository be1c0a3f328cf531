"""The page in Chromium, against a `ti-serve` of the miniature in a process of its own, which also learns.

With ONEWORD_SCREENSHOTS=FOLDER the tests also save screenshots there. ONEWORD_MINIATURE_BUNDLE names an exported
miniature, to save the export. Not covered: other browsers; the page's pure modules (tests/serve/page).
"""

import base64
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept, concept_bytes
from oneword.serve.keys import new_key
from oneword.train.miniature.world import HELD_OUT_LOOKS, Look, Scene, Thing, render

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = os.environ.get("ONEWORD_SCREENSHOTS")
PARTS = ("create", "words", "compare", "gallery")
DESKTOP, PHONE = (1280, 860), (390, 844)
BACKGROUNDS = ("studio", "kitchen", "desert", "meadow", "brick")
LOOKS = {look.shape: look for look in HELD_OUT_LOOKS}
BALL, STAR, HEART = LOOKS["circle"], LOOKS["star"], LOOKS["heart"]
PATIENCE = 120_000  # ms; a shared machine may be slow, and nothing here measures time

BOTTOM = """() => {
  const bottoms = [...document.querySelector("main").children].map((part) => part.getBoundingClientRect().bottom);
  const whole = innerWidth < 600 || document.querySelector("dialog");
  return [innerWidth, whole ? innerHeight : Math.min(innerHeight, Math.ceil(Math.max(...bottoms)) + 40)];
}"""
"""The size of what can be seen; on a phone, whose parts are named at the bottom, and with a dialog, of all."""

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")]


@dataclass
class Server:
    """A `ti-serve` that can be killed and started again at the same address. It keeps everything in `folder`."""

    bundle: Path
    folder: Path
    options: list[str] = field(default_factory=list[str])
    key: str = ""
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "oneword.serve.cli", str(self.bundle), *self.options]
        command += ["--port", str(self.port), "--threads", "1"]
        command += ["--words", str(self.folder / "words"), "--jobs", str(self.folder / "jobs")]
        log = self.folder / "server.log"
        with log.open("ab") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream)
        while not self._ready():
            assert self.process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """Kills the server; its parent then ends, and so does a learning process, by themselves."""
        if self.process is not None:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def learn(self, token: str, look: Look) -> None:
        """Learns a word from photographs of a look."""
        files = [("image[]", (f"{i}.png", photograph(look, i), "image/png")) for i in range(5)]
        with self.client() as http:
            job = http.post("/v1/words/learn", files=files, data={"name": token}).raise_for_status().json()
            while job["status"] in ("queued", "running"):
                time.sleep(0.2)
                job = http.get(f"/v1/jobs/{job['id']}").json()
        assert job["status"] == "succeeded", job["error"]

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if options := os.environ.get("ONEWORD_MINIATURE_BUNDLE"):
        return Path(options)
    from tests.bundles import export_once

    return export_once("miniature", tmp_path_factory.mktemp("miniature") / "bundle").bundle.path


@pytest.fixture(scope="module")
def word_file(bundle: Path) -> Callable[[str], bytes]:
    """Files of random words that fit the model."""
    widths = {encoder.graph: encoder.width for encoder in Bundle.open(bundle).manifest.encoders}

    def make(token: str) -> bytes:
        draw = np.random.default_rng(list(token.encode()))
        rows = {name: draw.normal(0, 0.4, (1, width)).astype(np.float32) for name, width in widths.items()}
        return concept_bytes(Concept(token, rows))

    return make


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has learned the words <gem> and <toy>."""
    server = Server(bundle, tmp_path_factory.mktemp("server"), ["--model", "miniature"])
    server.start()
    server.learn("<toy>", BALL)
    server.learn("<gem>", HEART)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that a person has open, with what its console complained about."""

    page: Any
    complaints: list[str]
    requests: list[str]

    def open(self, server: Server, part: str = "create") -> None:
        self.page.goto(f"{server.url}/#/{part}")
        self.page.wait_for_selector("h1", state="attached")
        if part in ("create", "compare"):
            self.page.wait_for_selector(".chip")

    def go(self, part: str) -> None:
        self.page.click(f'nav a[href="#/{part}"]')

    def draw(self, prompt: str, *, steps: int = 6, count: int = 2) -> None:
        """Fills in the form and starts."""
        page = self.page
        if not page.is_visible("#steps"):
            page.click("text=Settings")
        page.fill("#steps", str(steps))
        page.click("text=Settings")
        while int(page.inner_text(".composer output").split()[0]) > count:
            page.click('[aria-label="Fewer pictures"]')
        page.fill("#prompt", prompt)
        page.click("text=Create >> nth=-1")

    def wait_for_pictures(self, count: int) -> None:
        self.page.wait_for_selector(f".tile.done >> nth={count - 1}")

    def teach(self, server: Server, name: str, look: Look) -> None:
        """Opens the words page, drops three pictures, names the word and starts learning it."""
        self.open(server, "words")
        self.drop(".drop", *[(f"{i}.png", photograph(look, i)) for i in range(3)])
        self.page.wait_for_selector(".slot img >> nth=2")
        self.page.fill("#name", name)
        self.page.click("text=Learn it")
        self.page.wait_for_selector(".learning")

    def wait_for_previews(self, column: int) -> None:
        """Waits for the pictures of all prompts in a column of the sheet, counted from 1."""
        for row in range(3):
            self.page.wait_for_selector(f".sheet tbody tr >> nth={row} >> td >> nth={column - 1} >> img")

    def drop(self, target: str, *files: tuple[str, bytes]) -> None:
        """Drops files on an element, as from the desktop."""
        transfer = self.page.evaluate_handle(
            """(files) => {
              const transfer = new DataTransfer();
              for (const [name, bytes] of files) {
                transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
              }
              return transfer;
            }""",
            [[name, list(data)] for name, data in files],
        )
        self.page.dispatch_event(target, "drop", {"dataTransfer": transfer})

    def save(self, name: str) -> None:
        """Saves a screenshot, without empty space at the bottom, if they are wanted."""
        if SCREENSHOTS:
            self.page.mouse.move(0, 0)
            width, height = self.page.evaluate(BOTTOM)
            clip = {"x": 0, "y": 0, "width": width, "height": height}
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), animations="disabled", clip=clip)


Visitor = Callable[..., Visit]


@pytest.fixture
def visitor(browser: Any) -> Iterator[Visitor]:
    """Opens pages; at the end no script has failed, nothing broke the content policy, and no other host was asked."""
    visits: list[tuple[Any, Visit]] = []

    def visit(size: tuple[int, int] = DESKTOP, scheme: str = "light", **options: Any) -> Visit:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, is_mobile=size == PHONE, **options
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        visit = Visit(page, [], [])
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.on("console", lambda message: visit.complaints.append(message.text) if _is_bad(message) else None)
        page.on("request", lambda request: visit.requests.append(request.url))
        visits.append((context, visit))
        return visit

    yield visit
    for context, visit_ in visits:
        context.close()
        assert visit_.complaints == []
        assert {url.split("/")[2] for url in visit_.requests if url.startswith("http")} <= {
            f"127.0.0.1:{url.split(':')[2].split('/')[0]}" for url in visit_.requests[:1]
        }


def _is_bad(message: Any) -> bool:
    """Failed requests are part of some tests; everything else is not."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def photograph(look: Look, number: int) -> bytes:
    """A picture of a look that the miniature has never seen, somewhere else each time."""
    pixels, _ = render(Scene((Thing(look),), BACKGROUNDS[number]), seed=1000 + number)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_a_word_is_learned_from_dropped_pictures_and_used(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server, "words")
    visit.drop(".drop", *[(f"{i}.png", photograph(BALL, i)) for i in range(5)])
    visit.page.wait_for_selector(".slot img >> nth=4")
    visit.page.fill("#name", "ball")
    visit.save("page-teach")
    visit.page.click("text=Learn it")
    visit.wait_for_previews(column=3)
    visit.save("page-learning")
    visit.page.wait_for_selector(".ready .primary")
    steps = visit.page.locator(".sheet thead th").all_inner_texts()[1:]
    assert [text.removeprefix("Step ") for text in steps] == ["Start", "5", "10", "20", "35", "50"]
    assert visit.page.locator(".sheet tbody tr").count() == 3
    for row in visit.page.locator(".sheet tbody tr").all():
        row.locator("img >> nth=5").wait_for()
        first, *_, last = [image.get_attribute("src") for image in row.locator("img").all()]
        assert first != last
    visit.save("page-learned")
    visit.page.click(".ready .primary")
    assert visit.page.input_value("#prompt") == "a photo of a <ball>"
    visit.page.click("text=Create >> nth=-1")
    visit.wait_for_pictures(4)
    visit.save("page-create")
    with server.client() as http:
        http.delete("/v1/words/<ball>").raise_for_status()


def test_learning_goes_on_after_the_server_was_killed(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.teach(server, "star", STAR)
    visit.wait_for_previews(column=1)
    server.kill()
    visit.page.wait_for_selector(".connection p")
    server.start()
    visit.page.wait_for_selector(".connection p", state="detached")
    visit.page.wait_for_selector(".ready .primary")
    visit.page.wait_for_selector(".sheet img >> nth=17")
    with server.client() as http:
        (job,) = [job for job in http.get("/v1/jobs").json()["data"] if job["name"] == "<star>"]
        assert (job["status"], job["step"]) == ("succeeded", 50)
        assert http.get("/v1/words/<star>").json()["identity"] == job["word"]["identity"]
        http.delete("/v1/words/<star>").raise_for_status()


def test_learning_is_found_again_after_a_reload(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.teach(server, "reloaded", STAR)
    visit.wait_for_previews(column=1)
    visit.page.reload()
    visit.wait_for_previews(column=2)
    visit.page.click(".learning >> text=Cancel")
    visit.page.wait_for_selector("text=Cancelled")
    with server.client() as http:
        assert http.get("/v1/jobs").json()["data"][0]["status"] == "cancelled"


def test_learning_is_cancelled(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.teach(server, "never", STAR)
    visit.page.click(".learning >> text=Cancel")
    visit.page.wait_for_selector("text=Cancelled")
    with server.client() as http:
        assert "<never>" not in [word["name"] for word in http.get("/v1/words").json()["data"]]
        (status,) = [job["status"] for job in http.get("/v1/jobs").json()["data"] if job["name"] == "<never>"]
        assert status == "cancelled"


def test_pictures_are_previewed_while_they_are_drawn_and_carry_what_made_them(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a photo of a <toy>", steps=30, count=2)
    visit.page.wait_for_selector(".tile.running .preview")
    visit.save("page-drawing")
    visit.wait_for_pictures(2)
    visit.page.click(".tile-open >> nth=1")
    facts = visit.page.inner_text(".facts")
    with visit.page.expect_download() as download:
        visit.page.click("dialog >> text=Download")
    text = PIL.Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).info["parameters"]
    assert text.startswith("a photo of a <toy>\nSteps: 30,")
    seed = text.split("Seed: ")[1].split(",")[0]
    assert seed in facts


def test_the_keyboard_alone_completes_a_word_and_draws(server: Server, visitor: Visitor) -> None:
    visit = visitor(reduced_motion="reduce")
    visit.open(server)
    visit.page.focus("#prompt")
    visit.page.keyboard.type("a <t")
    visit.page.wait_for_selector('[role="option"][aria-selected="true"]')
    visit.page.keyboard.press("Enter")
    assert visit.page.input_value("#prompt") == "a <toy>"
    visit.page.keyboard.press("Control+Enter")
    visit.page.wait_for_selector(".tile.running, .tile.done")
    visit.page.focus(".run button >> nth=0")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector(".tile.cancelled, .tile.done")


def test_more_like_this_starts_from_the_picture(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a photo of a red star", count=1)
    visit.wait_for_pictures(1)
    visit.page.click(".tile-open")
    visit.page.click("dialog >> text=Close >> nth=-1")
    visit.page.click("text=More like this")
    visit.page.wait_for_selector("text=More like seed")
    visit.wait_for_pictures(5)
    assert any(url.endswith("/v1/images/edits") for url in visit.requests)


def test_only_the_painted_part_is_repainted(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a photo of a red star", count=1)
    visit.wait_for_pictures(1)
    before = _pixels(visit, 0)
    visit.page.click(".tile-open")
    visit.page.click("text=Repaint a part")
    canvas = visit.page.locator(".mask canvas")
    box = canvas.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.2, steps=5)
    visit.page.mouse.up()
    visit.save("page-mask")
    visit.page.fill("#mask-prompt", "a photo of a blue ring")
    visit.page.click("dialog >> text=Repaint >> nth=-1")
    visit.wait_for_pictures(5)
    after = _pixels(visit, 0)
    assert (after[40:] == before[40:]).all()  # the brush reaches about 0.31 of the height
    assert (after[:18] != before[:18]).any()


def test_a_word_is_refined_by_likes(server: Server, visitor: Visitor) -> None:
    with server.client() as http:
        http.put("/v1/words/<pet>", content=http.get("/v1/words/<gem>/file").content).raise_for_status()
        before = http.get("/v1/words/<pet>").json()["identity"]
    visit = visitor()
    page = visit.page
    visit.open(server, "words")
    page.click('[aria-label="More about pet"]')
    page.click("text=Refine by likes")
    page.wait_for_selector(".candidate img >> nth=5")
    page.click('[aria-label="Like picture 2"]')
    page.click('[aria-label="Dislike picture 1"]')
    visit.save("page-refine")
    _check_access(visit, "refine")
    page.click("text=Next round")
    page.wait_for_selector("text=Round 2.")
    page.click("text=Undo the last round")
    page.wait_for_selector("text=Round 1.")
    page.click('[aria-label="Like picture 3"]')
    page.click("text=Next round")
    page.wait_for_selector("text=Round 2.")
    page.click("text=Keep the word")
    page.wait_for_selector("dialog", state="detached")
    with server.client() as http:
        assert http.get("/v1/words/<pet>").json()["identity"] != before
        http.delete("/v1/words/<pet>").raise_for_status()


def test_words_are_compared_on_the_same_seeds(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a photo", steps=20, count=1)
    visit.go("compare")
    visit.page.fill("#compare-prompt", "a {} in the snow")
    visit.page.click("button.primary >> text=Compare")
    visit.wait_for_pictures(4)
    assert visit.page.locator(".compare thead mark").all_inner_texts() == ["gem", "toy"]
    visit.save("page-compare")
    seeds = visit.page.locator(".compare tbody th").all_inner_texts()
    labels = [button.get_attribute("aria-label") for button in visit.page.locator(".compare .tile-open").all()]
    assert (_pixels(visit, 0) != _pixels(visit, 1)).any()
    for row, seed in enumerate(seeds):
        assert all(label.endswith(seed) for label in labels[2 * row : 2 * row + 2])


def test_a_dropped_picture_restores_what_made_it(server: Server, visitor: Visitor) -> None:
    with server.client() as http:
        body = {"prompt": "a <gem> ★", "negative_prompt": "dark", "seed": 77, "steps": 5, "sampler": "euler-a"}
        answer = http.post("/v1/images/generations", json=body | {"guidance_scale": 3.5, "size": "64x96"}, timeout=60)
        data = answer.raise_for_status().json()["data"][0]["b64_json"]
    visit = visitor()
    visit.open(server)
    visit.drop("main", ("old.png", base64.b64decode(data)))
    visit.page.wait_for_selector("text=Restored all settings")
    visit.page.click("text=Settings")
    fields = ("prompt", "negative", "seed", "steps", "sampler", "guidance", "width", "height")
    values = [visit.page.input_value(f"#{name}") for name in fields]
    assert values == ["a <gem> ★", "dark", "77", "5", "euler-a", "3.5", "64", "96"]
    visit.page.click("text=Create >> nth=-1")
    visit.wait_for_pictures(1)
    assert (_pixels(visit, 0) == np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))).all()


def test_the_gallery_keeps_pictures_over_a_reload(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    prompts = (
        "a <toy> at night",
        "a painting of a <gem>",
        "a drawing of a <toy>",
        "a <gem> in the snow",
        "a <toy> by the sea",
    )
    for number, prompt in enumerate(prompts, 1):
        visit.draw(prompt, steps=20, count=2)
        visit.wait_for_pictures(2 * number)
    visit.page.reload()
    visit.go("gallery")
    visit.wait_for_pictures(10)
    visit.save("page-gallery")
    visit.page.click('[aria-label="Empty the gallery"]')
    visit.page.click("text=Delete all")
    visit.page.wait_for_selector("text=Nothing here yet")
    assert visit.page.locator("main img").count() == 0


def test_cancel_frees_the_engine_and_keeps_the_page(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a photo of a <toy>", steps=1000, count=2)
    visit.page.wait_for_selector(".tile.running")
    visit.page.click(".queue-button")
    visit.page.wait_for_selector(".queue-entry")
    visit.page.click('[aria-label="Cancel a photo of a <toy>"]')
    visit.page.wait_for_selector(".tile.cancelled >> nth=1")
    with server.client() as http:
        while http.get("/v1/queue").json()["data"]:
            time.sleep(0.05)
    assert visit.page.locator(".tile.cancelled").count() == 2
    visit.draw("a photo of a <toy>", steps=4, count=2)
    visit.wait_for_pictures(2)


def test_pictures_go_on_after_the_server_was_killed(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a photo of a <toy>", steps=300, count=2)
    visit.page.wait_for_selector(".tile.running")
    server.kill()
    visit.page.wait_for_selector(".connection p")
    visit.save("page-reconnecting")
    server.start()
    visit.page.wait_for_selector(".connection p", state="detached")
    visit.wait_for_pictures(2)
    assert visit.page.locator(".tile.failed, .tile.cancelled").count() == 0


def test_a_refusal_is_shown_in_the_servers_words(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.draw("a <tot>", count=1)
    visit.page.wait_for_selector('.run [role="alert"]')
    assert "<toy>" in visit.page.inner_text('.run [role="alert"]')
    assert "No word is called tot" in visit.page.inner_text("#prompt-help")


def test_words_are_added_renamed_and_deleted(
    server: Server, visitor: Visitor, word_file: Callable[[str], bytes]
) -> None:
    visit = visitor()
    visit.open(server, "words")
    file = {"name": "w.safetensors", "mimeType": "application/octet-stream", "buffer": word_file("<extra>")}
    visit.page.set_input_files('.file-button input[type="file"]', file)
    visit.page.click('[aria-label="More about extra"]')
    visit.page.click("text=Rename")
    visit.page.fill("#new-name", "renamed")
    visit.page.click("dialog >> text=Rename >> nth=-1")
    visit.page.click('[aria-label="More about renamed"]')
    visit.page.click('[role="menuitem"] >> text=Delete')
    visit.page.click("dialog >> text=Delete >> nth=-1")
    visit.page.wait_for_selector('[aria-label="More about renamed"]', state="detached")
    with server.client() as http:
        assert [word["name"] for word in http.get("/v1/words").json()["data"]][:2] == ["<gem>", "<toy>"]


def test_a_key_is_requested_once_and_kept_in_the_tab_only(bundle: Path, tmp_path: Path, visitor: Visitor) -> None:
    key, lines = new_key("alice")
    (tmp_path / "keys.toml").write_text(lines)
    server = Server(bundle, tmp_path, ["--keys", str(tmp_path / "keys.toml")], key)
    server.start()
    try:
        visit = visitor()
        visit.page.goto(server.url)
        visit.page.fill("#key", "ow_wrong")
        visit.page.click("text=Continue")
        visit.page.wait_for_selector("text=does not know this key")
        visit.page.fill("#key", key)
        visit.page.click("text=Continue")
        visit.page.wait_for_selector("text=No words yet")
        assert key in visit.page.evaluate("Object.values(sessionStorage)")
        assert visit.page.evaluate("localStorage.length") == 0
        assert not any(key in url for url in visit.requests)
        visit.page.reload()
        visit.page.wait_for_selector("text=No words yet")
    finally:
        server.kill()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(
    server: Server, visitor: Visitor, size: tuple[int, int], scheme: str
) -> None:
    visit = visitor(size, scheme, reduced_motion="reduce")
    visit.open(server)
    visit.draw("a photo of a <toy> in the snow", steps=20, count=4)
    visit.wait_for_pictures(4)
    name = f"{'phone' if size == PHONE else 'desktop'}-{scheme}"
    for part in PARTS:
        visit.go(part)
        visit.page.wait_for_selector(".tile.done, .card:not(.skeleton), .compare, .chip")
        visit.save(f"{name}-{part}")
        _check_access(visit, f"{part}")
    visit.go("create")
    visit.page.click("text=Settings")
    _check_access(visit, "settings")
    visit.page.click(".tile-open >> nth=0")
    visit.page.wait_for_selector("dialog[open] img")
    visit.save(f"{name}-picture")
    _check_access(visit, "picture")
    visit.page.click("text=Repaint a part")
    visit.page.wait_for_selector(".mask canvas")
    _check_access(visit, "mask")


def _check_access(visit: Visit, label: str) -> None:
    violations = axe.Axe().run(visit.page).response["violations"]
    assert [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in violations] == [], label
    wide = visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{label} is {wide} pixels wider than the screen"


def _pixels(visit: Visit, index: int) -> Any:
    """The pixels of a finished picture on the page."""
    width, height, data = visit.page.evaluate(
        """async (index) => {
          const image = document.querySelectorAll(".tile.done img")[index];
          await image.decode();
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return [canvas.width, canvas.height, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
        }""",
        index,
    )
    return np.asarray(data, np.uint8).reshape(height, width, 4)[:, :, :3]
