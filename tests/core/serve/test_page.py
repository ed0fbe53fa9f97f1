"""The chat page in headless Chromium, driven as a person would: keys and clicks in, what is seen out."""

from __future__ import annotations

import re
import shutil

import pytest

from research.core.serve.admin import PAGE
from tests.core.serve.fake_engine import FakeEngine

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")

ANSWER = """A **bold** word and `code`.

```python
print("<b>hi</b>")
```

- one
- two <script>document.title = "owned"</script>

| a | b |
|---|---|
| 1 | [x](javascript:document.title='owned') |

<img src=x onerror="document.title='owned'"> https://example.com/a_b."""


def test_the_page_loads_nothing_from_elsewhere_and_never_parses_text_as_markup():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|href|from|url\(|@import|fetch\()\s*=?\s*["'(]*(?:https?:)?//""", text), file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file
        )
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son[a-z]+=|<script(?![^>]*\ssrc=)|\sstyle=", page), (
        "the policy forbids inline code and styles"
    )


@pytest.fixture(scope="module")
def server(start):
    engine = FakeEngine(adapters=("french",))
    with start(engine) as server:
        server.engine = engine
        yield server


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,800",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser, server):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.server = browser, server
        self._wait = WebDriverWait(browser, 20, poll_frequency=0.05)

    def open(self):
        self.browser.get(self.server.url + "/")
        self.until(lambda: self.js("return document.querySelectorAll('#model option').length") > 0)

    def until(self, holds):
        return self._wait.until(lambda _: holds())

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def texts(self, selector):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent.trim())", selector)

    def keys(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    @property
    def busy(self):
        return self.js("return document.body.classList.contains('busy')")

    def ask(self, text, wait=True):
        from selenium.webdriver.common.keys import Keys

        self.find("#prompt").send_keys(text, Keys.ENTER)
        if wait:
            self.until(lambda: not self.busy and self.texts("article.assistant .note")[-1])


@pytest.mark.slow
def test_a_conversation_by_keyboard_streams_stops_switches_adapters_and_outlives_a_reload(server, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    engine = server.engine
    engine.script = lambda request, choice: ANSWER
    page = Page(browser, server)
    page.open()
    assert page.js("return document.activeElement.id") == "prompt"

    # An answer: markdown as elements, everything else as text, nothing of it run.
    page.ask("Show me <b>markdown</b>")
    assert page.texts("article.user .body") == ["Show me <b>markdown</b>"]
    assert page.texts("article.assistant strong") == ["bold"]
    assert page.texts("article.assistant pre code") == ['print("<b>hi</b>")']
    assert page.texts("article.assistant li")[1].endswith("</script>") and len(page.texts("article.assistant td")) == 2
    assert page.js("return [...document.querySelectorAll('article a')].map(a => a.href)") == ["https://example.com/a_b"]
    assert page.js("return document.querySelectorAll('article script, article img').length") == 0
    assert "owned" not in browser.title
    assert re.search(r"qwen2_5_tiny · \d+ tokens · [\d.]+ tokens/s", page.texts("article.assistant .note")[0])

    # A slow answer is seen while it comes, and stopped with Esc; what has come stays.
    engine.script, engine.step_s = lambda request, choice: "word " * 300, 0.02
    page.ask("Count", wait=False)
    page.until(lambda: len(page.texts("article.assistant .body")[-1]) > 40)
    assert page.busy and page.find("#send").get_attribute("aria-label") == "Stop"
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.busy)
    stopped = page.texts("article.assistant .body")[-1]
    assert 40 < len(stopped) < 1000 and page.texts("article.assistant .note")[-1].endswith("stopped")
    page.until(lambda: server.service.open == 0)

    # Again, with an adapter, a system prompt and settings, which reach the engine.
    engine.script, engine.step_s = lambda request, choice: "Bonjour.", 0.0
    page.js("const m = document.getElementById('model'); m.value = 'french'; m.dispatchEvent(new Event('change'))")
    ActionChains(browser).key_down(Keys.ALT).send_keys("s").key_up(Keys.ALT).perform()
    page.find("#system").send_keys("Speak French.")
    page.find("#temperature").send_keys("0.5")
    page.find("#seed").send_keys("7")
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.js("return document.getElementById('settings').open"))
    ActionChains(browser).key_down(Keys.ALT).send_keys("r").key_up(Keys.ALT).perform()
    page.until(lambda: not page.busy and page.texts("article.assistant .body")[-1] == "Bonjour.")
    request = engine.requests[-1]
    assert (request.adapter, request.sampling.temperature, request.sampling.seed) == ("french", 0.5, 7)
    shown = engine.tokenizer.decode(request.prompt)
    assert "system\nSpeak French.<|im_end|>" in shown and shown.count("<|im_start|>user") == 2
    assert len(page.texts("article.assistant")) == 2, "the stopped answer is not replaced"

    # A second conversation; both, the adapter and the settings outlive a reload.
    ActionChains(browser).key_down(Keys.ALT).send_keys("n").key_up(Keys.ALT).perform()
    page.ask("Other")
    page.open()
    assert page.texts("#conversations .open") == ["Other", "Show me <b>markdown</b>"]
    assert page.texts("article .body") == ["Other", "Bonjour."]
    assert page.find("#model").get_attribute("value") == "french"
    assert page.find("#temperature").get_attribute("value") == "0.5"
    ActionChains(browser).key_down(Keys.ALT).send_keys(Keys.ARROW_DOWN).key_up(Keys.ALT).perform()
    assert page.texts("article.user .body") == ["Show me <b>markdown</b>", "Count"]
    assert page.texts("article.assistant pre code") == ['print("<b>hi</b>")']

    # Light and dark: the system's choice, or the button's.
    back = "return getComputedStyle(document.body).backgroundColor"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = page.js(back)
    page.find("#theme").click()
    assert page.js(back) == "rgb(255, 255, 255)" != dark

    # An error of the server is shown where the answer would be, and the page goes on.
    engine.adapters.remove("french")
    server.service.driver.adapters = ()
    page.find("#prompt").send_keys("Still there?", Keys.ENTER)
    page.until(lambda: page.texts(".problem"))
    assert "french" in page.texts(".problem")[0]
    page.open()
    assert page.find("#model").get_attribute("value") == "qwen2_5_tiny"
    page.ask("And now?")
    assert page.texts("article.assistant .body")[-1] == "Bonjour."
    severe = [
        entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "404" not in entry["message"]
    ]
    assert severe == [], "the policy or the page's own code has failed"
