"""The page at `/`: its files, and how it behaves in Chromium. The tests with a browser need Chromium and playwright."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dovetail.runtime.serve.page import HEADERS, page_files
from dovetail.runtime.serve.service import Limits

FILES = page_files()
HTML = FILES["/"].content.decode()
SCRIPTS = {path: file.content.decode() for path, file in FILES.items() if path.endswith(".js")}
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
in_browser = pytest.mark.skipif(
    not BROWSER or not importlib.util.find_spec("playwright"), reason="needs Chromium and playwright"
)

# --- its files


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path, file in FILES.items():
        text = file.content.decode()
        found = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", re.sub(r"(?m)^\s*//.*$|\s// .*$", "", text)))
        assert found <= {"http://www.w3.org/2000/svg"}, path
    named = set(re.findall(r"""(?:src|href|from)\s*=?\s*["'](?!#)([^"']+)["']""", HTML + "".join(SCRIPTS.values())))
    assert named and {f"/page/{name.rpartition('/')[2]}" for name in named} <= FILES.keys()


def test_the_page_lives_with_a_strict_policy() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in HEADERS["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", HTML)
    for path, script in SCRIPTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script), (
            path
        )


def test_scripts_find_their_elements() -> None:
    ids = re.findall(r'\bid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\bat\("([^"]+)"\)', SCRIPTS["/page/app.js"]))
    assert used <= set(ids)
    labelled = set(re.findall(r'\b(?:for|aria-labelledby|aria-describedby|aria-controls)="([^"]+)"', HTML))
    assert labelled <= set(ids)


# --- in a browser

ANSWER = """Here is a function that **merges** two sorted lists:

```python
def merge(left, right):
    merged = []
    while left and right:
        first = left if left[0] <= right[0] else right
        merged.append(first.pop(0))
    return merged + left + right
```

It has two steps:

1. Take the *smaller* item.
2. Append what is left.

The lists are emptied: pass `merge(a[:], b[:])`. <img src=x onerror=alert(1)> stays text.
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """The page in the browser, on a real server whose target says what the user tells it to say."""

    def __init__(self, browser: Any, server: Any, **context: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.faults, self.urls, self.bodies = list[str](), list[str](), list[dict[str, Any]]()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.on("request", self._note)
        self.page.goto(server.url)

    def _note(self, request: Any) -> None:
        self.urls.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def ask(self, text: str = f"say {ANSWER}") -> None:
        self.page.fill("#message", text)
        self.page.keyboard.press("Enter")

    def ended(self) -> None:
        self.page.wait_for_selector("#send:visible")
        self.page.wait_for_selector(".turn:last-child .again")

    def answer(self) -> str:
        text: str = self.page.inner_text(".turn:last-child .text")
        return text

    def set(self, **fields: str) -> None:
        """Change settings."""
        self.page.click("#open-settings")
        for name, value in fields.items():
            self.page.fill(f"[name={name}]", value)
        self.page.click("#settings [type=submit]")


Visiting = Callable[..., Visit]


@pytest.fixture
def visiting(chromium: Any, parrot: Any) -> Iterator[Visiting]:
    """Opens the page. At the end no page has failed, or asked another server."""
    visits = list[Visit]()

    def open_page(server: Any = parrot, **context: Any) -> Visit:
        visits.append(Visit(chromium, server, **context))
        return visits[-1]

    yield open_page
    for visit in visits:
        visit.context.close()
        assert all(url.startswith(visit.server.url) for url in visit.urls)
        assert not visit.faults


@pytest.fixture
def visit(visiting: Visiting) -> Visit:
    return visiting()


@in_browser
def test_an_answer_streams_and_is_drawn_from_text_alone(visit: Visit) -> None:
    visit.ask()
    visit.ended()
    page = visit.page
    assert page.inner_text("#model") == "parrot"
    assert "say Here is a function" in page.inner_text(".turn.user")
    assert page.inner_text(".turn .code code").startswith("def merge(left, right):\n    merged = []\n")
    assert page.inner_text(".turn .code header span") == "python"
    assert page.inner_text(".turn .text strong") == "merges" and page.inner_text(".turn .text em") == "smaller"
    assert page.locator(".turn .text ol li").count() == 2
    assert "<img src=x onerror=alert(1)>" in visit.answer() and page.locator(".turn img").count() == 0
    (body,) = visit.bodies
    assert [each["role"] for each in body["messages"]] == ["user"]
    assert body["speculate"] is True and body["stream"] is True and isinstance(body["seed"], int)
    assert body["stream_options"] == {"include_usage": True, "include_rounds": True}
    assert body["model"] == "parrot" and body["max_tokens"] == 512
    assert f"{len(ANSWER)} tokens" in page.inner_text(".turn .runs")


@in_browser
def test_a_conversation_goes_on(visit: Visit) -> None:
    for text in ("say One.", "say Two."):
        visit.ask(text)
        visit.ended()
    said = visit.bodies[1]["messages"]
    assert [(each["role"], each["content"]) for each in said] == [
        ("user", "say One."), ("assistant", "One."), ("user", "say Two."),
    ]  # fmt: skip
    visit.page.click("#fresh")
    assert visit.page.locator(".turn").count() == 0
    visit.ask("say Three.")
    visit.ended()
    assert len(visit.bodies[2]["messages"]) == 1 and visit.answer() == "Three."


@in_browser
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_can_be_stopped(visit: Visit, how: str) -> None:
    visit.ask(f"slow say {ANSWER}")
    visit.page.wait_for_selector(".turn .code")
    if how == "button":
        visit.page.click("#stop")
    else:
        visit.page.keyboard.press("Escape")
    visit.ended()
    assert "stopped" in visit.page.inner_text(".turn .runs")
    assert "two steps" not in visit.answer()
    visit.server.wait_idle()  # the engine works for nobody
    visit.ask("say Well.")
    visit.ended()
    assert visit.bodies[1]["messages"][1]["content"].startswith("Here is a function")
    assert visit.page.inner_text("#status") == "The answer is complete."


@in_browser
def test_plain_decoding_is_compared(visit: Visit) -> None:
    page = visit.page
    visit.ask()
    visit.ended()
    page.click(".again")
    page.wait_for_selector(".same")
    one, other = visit.bodies
    assert (one.pop("speculate"), other.pop("speculate")) == (True, False)
    assert one == other  # the same seed and settings
    assert re.fullmatch(r"\d+\.\d\d\u00d7", page.inner_text("#verdict strong"))
    for mode in ("drafted", "plain"):
        assert re.fullmatch(r"\d+\.\d tokens/s", page.inner_text(f"#speed-{mode}"))
    assert page.inner_text("#per-pass") == "1.00"
    page.uncheck("#speculate", force=True)
    visit.ask("say And again.")
    visit.ended()
    assert visit.bodies[2]["speculate"] is False
    assert page.inner_text(".turn:last-child .mode") == "plain"


@in_browser
def test_the_tree_of_each_round_is_drawn(visit: Visit) -> None:
    page = visit.page
    visit.ask()
    visit.ended()
    visit.server.wait_idle()
    asked = {**visit.bodies[0], "model": None}
    with visit.server.http() as client, client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    rounds = [event["dovetail"] for event in events if "tree" in event.get("dovetail", {})]
    assert any(len(one["tree"]["accepted"]) > 1 for one in rounds)
    assert page.locator("#bars .own").count() == len(rounds)
    assert page.input_value("#pick") == str(len(rounds))
    page.focus("#pick")
    for key, index in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", len(rounds) - 1)):
        page.keyboard.press(key)
        tree = rounds[index]["tree"]
        assert page.locator("#tree .node").count() == len(tree["tokens"]) + (tree["next"] is not None)
        assert page.locator("#tree .node.kept").count() == len(tree["accepted"])
        told = page.get_attribute("#tree svg", "aria-label")
        assert told.startswith(f"{len(tree['tokens']) - 1} drafted token")
        assert all(json.dumps(tree["tokens"][node]) in told for node in tree["accepted"])
        assert f"Round {index + 1} of {len(rounds)}" in page.get_attribute("#pick", "aria-valuetext")
        assert page.is_checked("#follow") == (key == "End")
    later = sum(one["tokens"] for one in rounds)
    assert page.inner_text("#per-pass") == f"{later / len(rounds):.2f}"


@in_browser
def test_a_failure_is_told_and_can_be_tried_again(visiting: Visiting, serve: Callable[..., Any]) -> None:
    visit = visiting(serve(limits=Limits(new_tokens=20)))
    visit.ask("say Hello.")
    visit.ended()
    assert "max_tokens 512 is above this server's limit" in visit.page.inner_text(".turn:last-child .fault")
    visit.set(max_tokens="20")
    visit.page.click("text=Try again")
    visit.page.wait_for_selector("text=Again without drafts")
    assert not visit.page.is_visible(".turn:last-child .fault") and visit.answer() == "Hello."
    visit.server.server.handle_exit(15, None)
    visit.server.thread.join(20)
    visit.ask("say And now?")
    visit.ended()
    assert "The server does not answer" in visit.page.inner_text(".turn:last-child .fault")
    assert any("status of 400" in fault for fault in visit.faults)  # the browser notes it
    visit.faults.clear()


@in_browser
def test_a_key_can_be_given(visiting: Visiting, serve: Callable[..., Any]) -> None:
    visit = visiting(serve(api_key="s3cret"))
    page = visit.page
    page.wait_for_selector("text=the API key is missing or wrong")
    visit.set(key="s3cret", system="Be brief.", temperature="0", seed="7")
    page.wait_for_selector("text=parrot")
    visit.ask("say Hello")
    visit.ended()
    (body,) = visit.bodies
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0 and body["seed"] == 7
    page.reload()
    page.wait_for_selector("text=parrot")  # the tab keeps the key
    assert "s3cret" not in json.dumps(page.evaluate("({...localStorage})"))
    visit.faults.clear()  # the browser notes the status 401


@in_browser
def test_everything_works_with_the_keyboard(visit: Visit) -> None:
    page = visit.page

    def focused() -> str:
        found: str = page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        return found

    assert focused() == "message"
    page.focus(".skip")
    order = [focused()]
    for _ in range(10):
        page.keyboard.press("Tab")
        order.append(focused())
    assert order[:4] == ["Skip to the message field", "fresh", "open-settings", "talk"]
    assert order[4:11] == [*[button.strip() for button in page.locator(".examples button").all_inner_texts()],
                           "message", "speculate", "send", "tree"]  # fmt: skip
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#settings').open")
    page.keyboard.press("Escape")
    assert not page.evaluate("document.querySelector('#settings').open") and focused() == "open-settings"
    page.focus("#message")
    page.keyboard.type("say One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    visit.ended()
    assert visit.bodies[0]["messages"][0]["content"] == "say One\nTwo" and focused() == "message"
    page.fill("#message", f"slow say {ANSWER}")
    page.focus("#send")
    page.keyboard.press("Space")
    page.wait_for_selector("#stop:visible")
    assert focused() == "stop"
    page.keyboard.press("Space")
    visit.ended()
    assert focused() == "send"


@in_browser
def test_a_screen_reader_hears_whole_sentences(visit: Visit) -> None:
    visit.page.evaluate(
        "window.heard = []; const ear = new MutationObserver((all) => all.forEach((one) =>"
        " one.addedNodes.forEach((node) => heard.push(node.textContent))));"
        " for (const id of ['status', 'spoken']) ear.observe(document.getElementById(id), {childList: true})"
    )
    visit.ask()
    visit.ended()
    visit.page.wait_for_selector("#status:text-is('The answer is complete.')", state="attached")
    heard = visit.page.evaluate("heard")
    assert heard[0] == "Answering." and heard[-1] == "The answer is complete."
    assert "".join(heard[1:-1]).split() == re.sub(r"\*\*|`+", "", ANSWER).split()
    assert all(each.endswith((" ", "\n")) for each in heard[1:-2])
    assert visit.page.get_attribute("#talk", "aria-live") is None


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(visiting: Visiting, serve: Callable[..., Any], scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    server = serve(limits=Limits(new_tokens=512))
    visit = visiting(server, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")

    def check(state: str) -> None:
        found = axe.run(visit.page).response["violations"]
        assert not found, f"{state}: " + "; ".join(f"{each['id']}: {each['nodes'][0]['html']:.200}" for each in found)

    check("welcome")
    visit.ask()
    visit.ended()
    if width < 1000:
        visit.page.click("#show-work")
    check("answered")
    visit.set(max_tokens="600")
    visit.ask("say More.")
    visit.ended()
    assert visit.page.is_visible(".turn:last-child .fault")
    check("failed")
    visit.page.click("#open-settings")
    check("settings")
    wide = visit.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width  # nothing leads out of a narrow screen
    visit.faults.clear()  # the browser notes the status 400


@in_browser
def test_nothing_moves_for_those_who_ask_for_stillness(visiting: Visiting) -> None:
    visit = visiting(reduced_motion="reduce")
    visit.ask(f"slow say {ANSWER}")
    visit.page.wait_for_selector(".busy")
    assert visit.page.evaluate("document.getAnimations().length") == 0
    visit.page.keyboard.press("Escape")
    visit.ended()


TEXTS = [
    "Plain words\nover two lines\n\nand **more** with `code` and *stress*.",
    "# Head\n\n- one\n- two\n  goes on\n\n1. first\n2) second\n\n~~~\nraw ``` text\n~~~\nend",
    "```js\nlet a = `x`;\n```\n```\nno end",
    "a * b * c, 2**3, **open, `open, <b>not bold</b> &amp; [link](javascript:alert(1))",
]


@in_browser
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_looks_the_same_however_it_grew(visit: Visit, text: str) -> None:
    grown, whole = visit.page.evaluate(
        """async (text) => {
          const { draw } = await import("/page/text.js");
          const [one, other] = [document.createElement("div"), document.createElement("div")];
          for (let end = 0; end <= text.length; end += 1) draw(one, text.slice(0, end));
          draw(other, text);
          return [one, other].map((each) => each.cloneNode(true).outerHTML.replace(/ data-key="[^"]*"/g, ""));
        }""",
        text,
    )
    assert grown == whole
    assert "<b>" not in whole and "<a" not in whole


@in_browser
def test_nodes_of_a_tree_do_not_overlap(visit: Visit) -> None:
    trees = list[dict[str, Any]]()
    for seed in range(60):
        step = itertools.count(seed)
        parents = [-1, *((next(step) * 7919 + node * 31) % node for node in range(1, 2 + seed % 30))]
        trees.append({"tokens": [f"t{node}" * (1 + node % 4) for node in range(len(parents))], "parents": parents})
    pictures = visit.page.evaluate(
        "async (trees) => { const { layout } = await import('/page/tree.js');"
        " return trees.map(({ tokens, parents }) => layout(tokens, parents)); }",
        trees,
    )
    for tree, picture in zip(trees, pictures, strict=True):
        boxes = [(node["x"], node["y"], node["x"] + node["width"], node["y"] + 24) for node in picture["nodes"]]
        assert len(boxes) == len(tree["tokens"])
        for one, other in itertools.combinations(boxes, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        for node, parent in enumerate(tree["parents"]):
            assert parent < 0 or boxes[node][0] > boxes[parent][2]
        assert max(box[2] for box in boxes) < picture["width"] and max(box[3] for box in boxes) < picture["height"]
