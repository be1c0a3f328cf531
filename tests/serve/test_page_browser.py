"""The page in Chromium, against a `ti-serve` of the miniature in a process of its own, which also learns.

With ONEWORD_SCREENSHOTS=FOLDER the tests also save screenshots there. ONEWORD_MINIATURE_BUNDLE names an exported
miniature, to save the export. Not covered: other browsers; the page's pure modules (tests/serve/page).
"""

import base64
import io
import json
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
import PIL.PngImagePlugin
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
def keyed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for a key, has no words and learns none."""
    folder = tmp_path_factory.mktemp("keyed")
    key, lines = new_key("alice")
    (folder / "keys.toml").write_text(lines)
    server = Server(bundle, folder, ["--keys", str(folder / "keys.toml")], key)
    server.start()
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
        link = f'nav a[href="#/{part}"]'
        self.page.click(link)
        self.page.wait_for_selector(f"{link}[aria-current=page]")  # the part before is gone

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
    box = _mask_canvas(visit).bounding_box()
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
    page.route("**/refine", lambda route: route.abort(), times=1)
    page.click("text=Keep the word")
    page.wait_for_selector("dialog [role=alert]")
    finishes: list[Any] = []
    page.on("request", lambda request: finishes.append(request) if '"finish"' in (request.post_data or "") else None)
    page.dblclick("text=Keep the word")
    page.wait_for_selector("dialog", state="detached")
    assert len(finishes) == 1
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


def test_a_new_comparison_ends_the_one_before_whose_pictures_nobody_sees(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    page = visit.page
    visit.open(server)
    visit.draw("a photo", steps=600, count=1)
    page.click(".run >> text=Cancel")
    visit.go("compare")
    page.click("button.primary >> text=Compare")
    page.wait_for_selector(".compare .tile.running")
    with page.expect_event("requestfailed"):
        page.click("button.primary >> text=Compare")
    page.wait_for_selector(".compare .tile.running")
    page.click(".composer-bar >> text=Cancel")
    page.wait_for_selector(".tile.waiting, .tile.running", state="detached")


@pytest.mark.parametrize(
    ("answer", "notice"),
    [
        ("abort", "The server has not answered yet: drop the picture again when it has."),
        ("edits", "This server’s model cannot start from a picture."),
    ],
)
def test_a_picture_that_cannot_be_a_start_is_answered(
    server: Server, visitor: Visitor, answer: str, notice: str
) -> None:
    def model(route: Any) -> None:
        if answer == "abort":
            route.abort()
        else:
            route.fulfill(json={**httpx.get(f"{server.url}/v1/model").json(), "edits": False})

    visit = visitor()
    visit.page.route("**/v1/model", model)
    visit.page.goto(f"{server.url}/#/create")
    visit.page.wait_for_selector(".connection p" if answer == "abort" else ".chip")
    visit.drop("main", ("start.png", photograph(BALL, 1)))
    visit.page.wait_for_selector(f".notice >> text={notice}")


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


def test_a_key_is_requested_once_and_kept_in_the_tab_only(keyed: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.page.goto(keyed.url)
    visit.page.fill("#key", "ow_wrong")
    visit.page.click("text=Continue")
    visit.page.wait_for_selector("text=does not know this key")
    visit.page.fill("#key", keyed.key)
    visit.page.click("text=Continue")
    visit.page.wait_for_selector("text=No words yet")
    assert keyed.key in visit.page.evaluate("Object.values(sessionStorage)")
    assert visit.page.evaluate("localStorage.length") == 0
    assert not any(keyed.key in url for url in visit.requests)
    visit.page.reload()
    visit.page.wait_for_selector("text=No words yet")


def test_a_key_that_cannot_be_sent_is_refused(keyed: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.page.goto(keyed.url)
    visit.page.fill("#key", f"“{keyed.key}”")
    visit.page.click("text=Continue")
    visit.page.wait_for_selector("#key-note >> text=this one contains “")
    visit.save("page-key")
    assert visit.page.evaluate("sessionStorage.length") == 0
    visit.page.evaluate("sessionStorage.setItem('oneword.key', '“stored”')")
    visit.page.reload()
    visit.page.fill("#key", keyed.key)
    visit.page.click("text=Continue")
    visit.page.wait_for_selector("text=No words yet")


def test_pictures_dropped_where_nothing_is_learned_are_answered(keyed: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.page.goto(f"{keyed.url}/#/words")
    visit.page.fill("#key", keyed.key)
    visit.page.click("text=Continue")
    visit.page.wait_for_selector("text=cannot learn them")
    visit.drop("main", *[(f"{i}.png", photograph(BALL, i)) for i in range(3)])
    visit.page.wait_for_selector(".notice >> text=This server cannot learn words")
    assert visit.page.url.endswith("#/words")


def test_a_number_is_typed_key_by_key(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.page.route("**/v1/model", _with_distilled_guidance)
    visit.open(server)
    visit.page.click("text=Settings")
    for name in ("#guidance", "#embedded"):
        for text in ("7.5", "1.05", "10.25"):
            visit.page.fill(name, "")
            visit.page.focus(name)
            visit.page.keyboard.type(text)
            assert visit.page.input_value(name) == text
    visit.page.fill("#seed", "")
    visit.page.focus("#seed")
    visit.page.keyboard.type("42")
    visit.page.keyboard.press("Control+a")
    visit.page.keyboard.press("Backspace")
    visit.page.focus("#steps")
    assert visit.page.input_value("#seed") == "42"  # an empty field has no meaning here
    visit.page.fill("#prompt", "a photo of a red star")
    with visit.page.expect_request("**/v1/images/generations") as request:
        visit.page.keyboard.press("Control+Enter")
    body = request.value.post_data_json
    assert (body["guidance_scale"], body["embedded_guidance"], body["seed"]) == (10.25, 10.25, 42)


def test_a_number_that_cannot_be_read_is_marked_and_nothing_starts(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.page.fill("#prompt", "a photo of a red star")
    visit.page.click("text=Settings")
    for name, text, bad in (("#steps", "1", "e"), ("#guidance", "12", "e")):
        visit.page.focus(name)
        visit.page.keyboard.type(text)
        assert visit.page.get_attribute(name, "aria-invalid") == "false"
        visit.page.keyboard.type(bad)
        visit.page.wait_for_selector(f"{name}[aria-invalid=true]")
        error = visit.page.get_attribute(name, "aria-describedby")
        assert visit.page.inner_text(f"#{error}") == "This is not a number."
    visit.page.click("text=Settings")

    visit.page.click("text=Create >> nth=-1")

    visit.page.wait_for_selector("#steps:focus")  # it is shown, and what was typed is still there
    visit.page.keyboard.press("Backspace")
    visit.page.wait_for_selector("#steps[aria-invalid=false]")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#guidance:focus")
    assert visit.page.evaluate("document.querySelector('#guidance').validity.badInput")
    assert not any(url.endswith("/v1/images/generations") for url in visit.requests)
    visit.go("compare")
    visit.go("create")
    visit.page.click("text=Settings")
    assert (visit.page.input_value("#guidance"), visit.page.input_value("#steps")) == ("12", "1")
    with visit.page.expect_request("**/v1/images/generations") as request:
        visit.page.click("text=Create >> nth=-1")
    assert (request.value.post_data_json["guidance_scale"], request.value.post_data_json["num_inference_steps"]) == (
        12,
        1,
    )


def _with_distilled_guidance(route: Any) -> None:
    response = route.fetch()
    body = response.json()
    body["defaults"]["embedded_guidance"] = 3.5
    route.fulfill(response=response, json=body)


def test_the_server_judges_settings_that_are_hidden(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    visit.page.click("text=Settings")
    visit.page.fill("#guidance", "7.3")
    visit.draw("a photo of a red star", steps=1, count=1)
    visit.wait_for_pictures(1)
    visit.page.click("text=Settings")
    visit.page.fill("#width", "70")
    visit.draw("a photo of a red star", steps=1, count=1)
    visit.page.wait_for_selector('.run [role="alert"] >> text=70')


def test_the_mask_lies_over_the_picture_at_every_width(server: Server, visitor: Visitor) -> None:
    visit = _repainting(server, visitor)
    page = visit.page
    page.focus("#brush-size")
    page.keyboard.press("Home")
    for width, height in (DESKTOP, (1000, 500), PHONE, (320, 640)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_selector(".mask img.crisp")
        box = page.locator(".mask img").bounding_box()
        assert page.locator(".mask canvas").bounding_box() == pytest.approx(box, abs=0.01)
        for share in (0.02, 0.5, 0.98):
            page.mouse.click(box["x"] + box["width"] * share, box["y"] + box["height"] * 0.5)
        painted = _painted(visit, 32)
        assert [painted[x] for x in (1, 16, 32, 48, 62)] == [True, False, True, False, True]
        page.click("text=Clear")
    page.mouse.move(box["x"] + 31, box["y"] + 37)
    page.mouse.down()
    page.mouse.move(box["x"] + 188, box["y"] + 101, steps=9)
    page.mouse.up()
    page.click("dialog >> text=Undo")
    assert page.locator("dialog >> text=Undo").is_disabled()  # a drag is one stroke


def test_the_keyboard_paints_from_where_the_brush_is(server: Server, visitor: Visitor) -> None:
    visit = _repainting(server, visitor)
    page = visit.page
    page.focus("#brush-size")
    page.keyboard.press("Home")
    page.focus(".mask canvas")

    def press(key: str, times: int = 1) -> None:
        for _ in range(times):
            page.keyboard.press(key)

    press("ArrowLeft", 20)  # each moves the brush by a third of 2.56 pixels, from the middle, at 32
    press("Space")
    press("ArrowRight", 10)
    press("Shift+ArrowRight", 4)
    assert _runs(_painted(visit, 32)) == 2
    press("Shift+ArrowRight", 4)
    assert _runs(_painted(visit, 32)) == 2
    page.click("dialog >> text=Erase")
    page.focus(".mask canvas")
    press("Shift+ArrowLeft", 4)
    painted = _painted(visit, 32)
    assert _runs(painted) == 2
    assert not painted[29]  # the erased end of the line, at 30
    assert painted[25]


def _repainting(server: Server, visitor: Visitor) -> Visit:
    """A visit that has drawn a picture and opened it to paint a mask."""
    visit = visitor()
    visit.open(server)
    visit.draw("a photo of a red star", steps=1, count=1)
    visit.wait_for_pictures(1)
    visit.page.click(".tile-open")
    _mask_canvas(visit)
    return visit


def _mask_canvas(visit: Visit) -> Any:
    """Where the mask of the open picture is painted, once its dialog is open and the picture has its size."""
    visit.page.click("text=Repaint a part")
    canvas = visit.page.locator('dialog[open] .mask canvas:not([width="1"])')
    canvas.wait_for()
    return canvas


def _painted(visit: Visit, row: int) -> list[bool]:
    """Which pixels of a row of the mask are painted."""
    found: list[bool] = visit.page.evaluate(
        """async (row) => {
          await new Promise(requestAnimationFrame);
          await new Promise(requestAnimationFrame);
          const mask = document.querySelector(".mask canvas");
          const context = new OffscreenCanvas(mask.width, 1).getContext("2d", { willReadFrequently: true });
          context.drawImage(mask, 0, -row);
          const { data } = context.getImageData(0, 0, mask.width, 1);
          return [...data].filter((_, i) => i % 4 === 3).map((alpha) => alpha >= 128);
        }""",
        row,
    )
    return found


def _runs(painted: list[bool]) -> int:
    """How many groups of neighbouring pixels are painted."""
    return sum(now and not before for before, now in zip([False, *painted], painted, strict=False))


def test_text_selected_beyond_a_dialog_does_not_close_it(server: Server, visitor: Visitor) -> None:
    page = _repainting(server, visitor).page
    page.wait_for_selector(".mask img.crisp")
    page.click(".mask canvas")
    dialog, text = page.locator("dialog").bounding_box(), page.locator("#mask-prompt").bounding_box()
    beside = dialog["x"] + dialog["width"] + 40
    page.mouse.move(text["x"] + 60, text["y"] + 15)
    page.mouse.down()
    page.mouse.move(beside, text["y"] + 15, steps=4)
    page.mouse.up()
    assert page.locator("dialog >> text=Undo").is_enabled()
    page.mouse.click(beside, text["y"] + 15)
    page.wait_for_selector("dialog", state="detached")


def test_many_runs_leave_connections_for_the_page(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    page = visit.page
    streams: list[Any] = []
    most = 0

    def begun(request: Any) -> None:
        nonlocal most
        if request.url.endswith("/v1/images/generations"):
            streams.append(request)
            most = max(most, len(streams))

    def ended(request: Any) -> None:
        if request in streams:
            streams.remove(request)

    page.on("request", begun)
    page.on("requestfinished", ended)
    page.on("requestfailed", ended)
    visit.draw("a photo of a <toy>", steps=600, count=1)
    page.focus("#prompt")
    for _ in range(6):
        page.keyboard.press("Control+Enter")
    page.wait_for_selector(".run >> nth=6")
    page.wait_for_selector(".tile.running >> nth=2")
    page.evaluate("fetch('v1/words', { signal: AbortSignal.timeout(20000) })")
    assert most == 3
    visit.save("page-waiting")
    page.click(".run >> nth=0 >> text=Cancel")  # the newest, which waits
    page.wait_for_selector(".run >> nth=0 >> .tile.cancelled")
    with page.expect_request("**/v1/images/generations"):
        page.click(".run >> nth=6 >> text=Cancel")  # the oldest, which is drawn
    page.click(".queue-button")
    page.click("text=Cancel all pictures")
    page.wait_for_selector(".tile.waiting, .tile.running", state="detached")


def test_pictures_that_the_browser_does_not_store_are_announced(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server)
    page = visit.page
    quota = page.context.new_cdp_session(page)
    quota.send("Storage.overrideQuotaForOrigin", {"origin": server.url, "quotaSize": 1})
    visit.draw("a photo of a red star", steps=1, count=1)
    page.wait_for_selector(".notice >> text=does not store new pictures")
    visit.go("gallery")
    page.wait_for_selector(".note >> text=does not store new pictures")
    visit.wait_for_pictures(1)
    visit.save("page-unstored")
    quota.send("Storage.overrideQuotaForOrigin", {"origin": server.url})
    page.click('[aria-label="Empty the gallery"]')
    page.click("text=Delete all")
    page.wait_for_selector(".note", state="detached")
    visit.go("create")
    page.click('[aria-label="Again, with new seeds"]')
    visit.wait_for_pictures(2)
    page.reload()
    visit.go("gallery")
    visit.wait_for_pictures(1)


def test_restored_settings_without_a_field_are_shown_and_removed(server: Server, visitor: Visitor) -> None:
    with server.client() as http:
        body = {"prompt": "a <gem>", "seed": 3, "steps": 2, "sampler": "euler", "spacing": "karras"}
        body |= {"guidance_rescale": 0.5, "guidance_interval": [0.28, 5.42]}
        answer = http.post("/v1/images/generations", json=body, timeout=60)
        data = answer.raise_for_status().json()["data"][0]["b64_json"]
    visit = visitor()
    visit.open(server)
    page = visit.page
    visit.drop("main", ("old.png", base64.b64decode(data)))
    page.wait_for_selector("text=Restored all settings")
    page.click("text=Settings")
    chips = page.locator(".chip.setting")
    assert chips.all_inner_texts() == ["Spacing karras", "Guidance rescale 0.5", "Guidance interval 0.28 to 5.42"]
    visit.save("page-restored")
    page.click('[aria-label="Remove Guidance rescale 0.5"]')
    assert chips.all_inner_texts() == ["Spacing karras", "Guidance interval 0.28 to 5.42"]
    visit.go("compare")
    assert chips.all_inner_texts() == ["Spacing karras", "Guidance interval 0.28 to 5.42"]
    page.click('[aria-label="Remove Guidance interval 0.28 to 5.42"]')
    visit.go("create")
    page.click("text=Settings")
    page.select_option("#sampler", "ddim")
    chips.first.wait_for(state="detached")
    page.click("text=Create >> nth=-1")
    visit.wait_for_pictures(1)


def test_what_cannot_be_restored_is_named(server: Server, visitor: Visitor) -> None:
    text = PIL.PngImagePlugin.PngInfo()
    settings = "Steps: 9, Sampler: DPM++ SDE, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 64x64, Model: other"
    text.add_text("parameters", f"a red star\n{settings}, Denoising strength: 0.6")
    stream = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(stream, "PNG", pnginfo=text)
    visit = visitor()
    visit.open(server)
    visit.drop("main", ("other.png", stream.getvalue()))
    notice = visit.page.locator(".notice")
    notice.wait_for()
    left = "Sampler DPM++ SDE, Schedule type Karras, the picture it started from"
    assert notice.inner_text() == f"Restored this picture’s settings, except: {left}."
    visit.save("page-partly-restored")
    visit.page.click("text=Settings")
    values = [visit.page.input_value(f"#{name}") for name in ("prompt", "steps", "sampler", "guidance", "seed")]
    assert values == ["a red star", "9", "", "7", "5"]
    assert visit.page.locator(".chip.setting").count() == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_curl_command_draws_the_same_picture(server: Server, visitor: Visitor, tmp_path: Path) -> None:
    start = photograph(BALL, 0)
    (tmp_path / "start.png").write_bytes(start)
    visit = visitor(permissions=["clipboard-read", "clipboard-write"])
    visit.open(server)
    page = visit.page
    visit.drop("main", ("start.png", start))
    page.wait_for_selector(".source img")
    visit.draw("<toy> in the snow; at night", steps=4, count=1)
    visit.wait_for_pictures(1)
    page.click('.run [aria-label="Copy as"]')
    page.click('[role="menuitem"] >> text=curl')
    page.wait_for_selector("text=Copied curl.")
    command = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(json.loads(answer)["data"][0]["b64_json"])))
    assert picture.info["parameters"].startswith("<toy> in the snow; at night\n")
    assert (np.asarray(picture) == _pixels(visit, 0)).all()


def test_learning_is_found_after_its_answer_was_lost(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    lose = _Lost("/v1/words/learn")
    visit.page.route("**/v1/words/learn", lose)
    visit.teach(server, "lost", STAR)
    assert lose.requests == 1
    visit.page.click(".learning >> text=Cancel")
    visit.page.wait_for_selector("text=Cancelled")


def test_a_word_that_is_being_learned_elsewhere_is_not_taken_for_ones_own(server: Server, visitor: Visitor) -> None:
    visit = visitor()
    visit.open(server, "words")
    visit.drop(".drop", *[(f"{i}.png", photograph(STAR, i)) for i in range(3)])
    visit.page.wait_for_selector(".slot img >> nth=2")
    visit.page.fill("#name", "twin")
    files = [("image[]", (f"{i}.png", photograph(HEART, i), "image/png")) for i in range(3)]
    with server.client() as http:
        fields = {"name": "<twin>", "recipe": "style", "steps": "1000"}
        job = http.post("/v1/words/learn", files=files, data=fields).raise_for_status().json()
        time.sleep(4)  # the page does not take a job for its own that began two seconds before

        visit.page.click("text=Learn it")

        visit.page.wait_for_selector(".teach [role=alert] >> text=<twin>")
        assert visit.page.locator(".learning").count() == 0
        assert visit.page.locator(".slot img").count() == 3
        assert http.get(f"/v1/jobs/{job['id']}").json()["status"] in ("queued", "running")
        http.delete(f"/v1/jobs/{job['id']}").raise_for_status()


def test_a_learning_request_that_the_browser_sends_twice_is_followed(server: Server, visitor: Visitor) -> None:
    visit = visitor()

    def send_twice(route: Any) -> None:
        assert route.fetch().ok
        route.fulfill(response=route.fetch())

    visit.page.route("**/v1/words/learn", send_twice)
    visit.teach(server, "twice", STAR)
    visit.page.click(".learning >> text=Cancel")
    visit.page.wait_for_selector("text=Cancelled")


def test_an_undo_whose_answer_is_lost_undoes_one_round(server: Server, visitor: Visitor) -> None:
    with server.client() as http:
        http.put("/v1/words/<again>", content=http.get("/v1/words/<gem>/file").content).raise_for_status()
    visit = visitor()
    page = visit.page
    lose = _Lost('"undo"')
    page.route("**/refine", lose)
    visit.open(server, "words")
    page.click('[aria-label="More about again"]')
    page.click("text=Refine by likes")
    for round_ in (1, 2):
        page.wait_for_selector(f"text=Round {round_}.")
        page.click('[aria-label="Like picture 1"]')
        page.click("text=Next round")
    page.wait_for_selector("text=Round 3.")
    page.click("text=Undo the last round")
    page.wait_for_selector("text=Round 2.")
    assert lose.requests == 2
    with server.client() as http:
        http.delete("/v1/words/<again>").raise_for_status()


@dataclass
class _Lost:
    """Loses the server's answer to the first request whose address or body contains a text; lets the others pass."""

    text: str
    requests: int = 0

    def __call__(self, route: Any) -> None:
        request = route.request
        if self.text not in request.url and self.text not in (request.post_data or ""):
            return route.continue_()
        self.requests += 1
        if self.requests > 1:
            return route.continue_()
        route.fetch()
        route.abort("connectionreset")


def test_a_long_name_fits_on_a_small_phone(server: Server, visitor: Visitor, word_file: Callable[[str], bytes]) -> None:
    name = "".join(f"{i:02d}" for i in range(31))
    with server.client() as http:
        http.put(f"/v1/words/<{name}>", content=word_file(f"<{name}>")).raise_for_status()
    visit = visitor((320, 640), "dark")
    visit.open(server)
    visit.save("small-phone-create")
    for part in PARTS:
        visit.go(part)
        visit.page.wait_for_selector(".chip, .card:not(.skeleton), .compare, .empty")
        _check_width(visit, part)
    visit.go("create")
    visit.draw(f"a photo of a <{name}>", steps=1, count=1)
    visit.wait_for_pictures(1)
    _check_width(visit, "run")
    visit.go("words")
    visit.page.click(f'[aria-label="More about {name}"]')
    visit.page.click('[role="menuitem"] >> text=Delete')
    _check_width(visit, "question")
    visit.save("small-phone-question")
    visit.page.click("dialog >> text=Delete >> nth=-1")
    visit.page.wait_for_selector(f'[aria-label="More about {name}"]', state="detached")


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
    _mask_canvas(visit)
    _check_access(visit, "mask")


def _check_access(visit: Visit, label: str) -> None:
    violations = axe.Axe().run(visit.page).response["violations"]
    assert [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in violations] == [], label
    _check_width(visit, label)


def _check_width(visit: Visit, label: str) -> None:
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
