"""The page in a real browser: headless Chromium through its driver, with what axe-core thinks of it.

Needs Debian's chromium and chromium-driver, and for the accessibility check axe-core: a path in EDGEKIT_AXE, or npm.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import QUOTE, ScriptedAssistant, Served, endless_bundle, make_model, served

from edgekit.assistant.records import Records
from edgekit.assistant.server import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no browser: apt-get install chromium chromium-driver",
    ),
]
TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("page") / "bundle", context=2048)


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[Served]:
    model = make_model(bundle, assistant=ScriptedAssistant(), max_tokens=1500)
    forward = model.session.engine.forward

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.005)  # so that there is time to press the button that stops it
        return forward(*arguments, **options)

    model.session.engine.forward = slowly  # type: ignore[method-assign]
    with served(model, records=Records.open(tmp_path / "log.db")) as server:
        yield server


@contextmanager
def chromium(
    *, width: int = 1280, height: int = 820, dark: bool = False, phone: bool = False
) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    if phone:
        options.add_experimental_option(
            "mobileEmulation", {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
        )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        if not phone:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})
        yield browser
    finally:
        browser.quit()


def until(browser: webdriver.Chrome, condition: Callable[[], Any], *, seconds: float = 20) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except StaleElementReferenceException:
            pass
        assert time.monotonic() < end, browser.find_element(By.TAG_NAME, "body").text
        time.sleep(0.02)


def shown(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def opened(browser: webdriver.Chrome, url: str) -> None:
    browser.get(url)
    until(browser, lambda: shown(browser, "#model") == ["tiny"])
    until(browser, lambda: browser.switch_to.active_element.get_attribute("id") == "question")


def ask(browser: webdriver.Chrome, text: str, *, mode: str) -> None:
    browser.execute_script(f"document.querySelector('#modes input[value={mode}]').click()")
    browser.find_element(By.ID, "question").send_keys(text + Keys.ENTER)


def finished(browser: webdriver.Chrome, count: int) -> bool:
    return len(shown(browser, ".answer[aria-busy=false]")) == count


def problems(browser: webdriver.Chrome) -> list[str]:
    """What the console says, and each request that left the server's own address."""
    found = [row["message"] for row in browser.get_log("browser")]
    for row in browser.get_log("performance"):
        message = json.loads(row["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if urlsplit(url).hostname not in ("127.0.0.1", None) and not url.startswith("chrome"):
                found.append(f"left the host: {url}")
    return found


def test_ask_stream_stop_cite_reload(server: Served) -> None:
    with chromium() as browser:
        opened(browser, server.url)
        ask(browser, "How often may I work from home?", mode="documents")
        until(browser, lambda: finished(browser, 1))
        assert shown(browser, ".said")[0].startswith("Staff may work from home on two days a week")
        assert shown(browser, ".route") == ["here"]
        assert shown(browser, ".sources .name") == ["Remote work", "Working hours", ""]
        assert shown(browser, ".more > summary") == ["1 more found"]
        browser.find_element(By.CSS_SELECTOR, ".cite").click()
        assert shown(browser, ".sources li.lit mark") == [QUOTE]
        answer, sources = (browser.find_element(By.CSS_SELECTOR, name).rect for name in (".said", ".sources"))
        assert sources["x"] > answer["x"] + answer["width"]  # beside it
        assert abs(sources["y"] - answer["y"]) < 40

        ask(browser, "Go on and on", mode="plain")
        lengths = []
        until(browser, lambda: lengths.append(len(shown(browser, ".said")[1])) or len(set(lengths)) > 4)  # type: ignore[func-returns-value]
        until(browser, lambda: "tok/s" in shown(browser, "#live-speed")[0])
        assert shown(browser, "#live-memory")[0].endswith("MB")
        assert shown(browser, "#live-energy") == ["n/a"]
        assert not browser.find_element(By.ID, "send").is_displayed()
        browser.find_element(By.ID, "stop").click()
        until(browser, lambda: finished(browser, 2))
        assert "stopped" in shown(browser, ".facts")[1]
        until(browser, lambda: not server.line.busy, seconds=5)
        assert len(server.model.session.current.tokens) < 1500  # type: ignore[union-attr]

        before = shown(browser, ".said, .user p, .sources .name")
        until(browser, lambda: shown(browser, "#list .now .open") == ["How often may I work from home?"])
        browser.refresh()
        until(browser, lambda: finished(browser, 2))
        after = shown(browser, ".said, .user p, .sources .name")
        assert after[:-1] == before[:-1]
        assert after[-1][:20] == before[-1][:20]  # a token more may have been on its way when it was stopped
        assert "stopped" in shown(browser, ".facts")[1]
        assert problems(browser) == []


def test_the_whole_of_a_document_can_be_asked(server: Served) -> None:
    with chromium() as browser:
        opened(browser, server.url)
        ask(browser, "How often may I work from home?", mode="documents")
        until(browser, lambda: finished(browser, 1))
        browser.find_element(By.CSS_SELECTOR, ".cite").click()
        browser.find_element(By.CSS_SELECTOR, ".lit .whole").click()
        assert shown(browser, "#whole-name") == ["Remote work"]
        ask(browser, "What else does it say?", mode="documents")
        until(browser, lambda: finished(browser, 2))
        assert "whole document, 1,234 tokens, taken from disk in 0.0 s" in shown(browser, ".facts")[1]
        browser.find_element(By.ID, "whole-end").click()
        ask(browser, "And the others?", mode="documents")
        until(browser, lambda: finished(browser, 3))
        assert server.model.assistant.documents == [None, "handbook/remote-work.md", None]  # type: ignore[union-attr]
        browser.refresh()
        until(browser, lambda: finished(browser, 3))
        assert "whole document" in shown(browser, ".facts")[1]
        assert problems(browser) == []


def test_conversations_are_listed_deleted_and_begun_anew(server: Served) -> None:
    with chromium() as browser:
        opened(browser, server.url)
        ask(browser, "First question", mode="documents")
        until(browser, lambda: finished(browser, 1) and shown(browser, "#list .open") == ["First question"])
        browser.find_element(By.ID, "new").click()
        until(browser, lambda: shown(browser, ".answer") == [])
        ask(browser, "Second question", mode="documents")
        until(browser, lambda: shown(browser, "#list .open") == ["Second question", "First question"])
        until(browser, lambda: finished(browser, 1))
        browser.find_elements(By.CSS_SELECTOR, "#list .open")[1].click()
        until(browser, lambda: shown(browser, ".user p") == ["First question"])
        browser.find_element(By.ID, "forget").click()
        browser.find_element(By.CSS_SELECTOR, "#sure button[value=no]").click()
        assert len(shown(browser, "#list .open")) == 2
        browser.find_element(By.ID, "forget").click()
        browser.find_element(By.CSS_SELECTOR, "#sure button[value=yes]").click()
        until(browser, lambda: shown(browser, "#list .open") == [])
        assert server.records is not None
        assert server.records.conversations() == []
        assert problems(browser) == []


def test_everything_by_keyboard_and_what_is_said_is_never_markup(server: Served) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script> & **bold** `code`"
    with chromium() as browser:
        opened(browser, server.url)
        ask(browser, attack, mode="documents")
        until(browser, lambda: finished(browser, 1))
        assert shown(browser, ".user p") == [attack]
        assert browser.find_elements(By.CSS_SELECTOR, "#log img, #log script") == []
        escaped = "return inline(arguments[0], document.createElement('p'), () => null).innerHTML"
        assert browser.execute_script(escaped, r"\*If\* *so* a\b <i>") == r"*If* <em>so</em> a\b &lt;i&gt;"
        box = browser.find_element(By.ID, "question")
        box.send_keys("one" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "two")
        assert box.get_property("value") == "one\ntwo"
        box.clear()
        ask(browser, "Go on", mode="plain")
        until(browser, lambda: len(shown(browser, ".said")) == 2 and len(shown(browser, ".said")[1]) > 10)
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        until(browser, lambda: finished(browser, 2))
        assert "stopped" in shown(browser, ".facts")[1]
        reached = set()
        for _ in range(40):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            element = browser.switch_to.active_element
            reached.add(element.get_attribute("id") or element.get_attribute("class"))
        assert {"new", "export", "forget", "theme", "question", "cite", "open"} <= reached
        assert problems(browser) == []


def test_a_token_is_asked_for_or_comes_with_the_address(bundle: Path) -> None:
    with served(make_model(bundle), settings=Settings(token=TOKEN)) as server:
        with chromium() as browser:
            opened(browser, f"{server.url}/#token={TOKEN.replace(' ', '%20')}")
            assert TOKEN not in browser.current_url
        with chromium() as browser:
            browser.get(server.url)
            until(browser, lambda: browser.find_element(By.ID, "token").is_displayed())
            browser.find_element(By.ID, "token").send_keys("wrong, but long enough" + Keys.ENTER)
            until(browser, lambda: browser.find_element(By.ID, "token").get_property("value") == "")
            until(browser, lambda: browser.find_element(By.ID, "token").is_displayed())
            browser.find_element(By.ID, "token").send_keys(TOKEN + Keys.ENTER)
            until(browser, lambda: shown(browser, "#model") == ["tiny"])


def test_errors_are_shown_and_can_be_tried_again(server: Served) -> None:
    with chromium() as browser:
        opened(browser, server.url)
        browser.execute_script("document.getElementById('question').value = 'word '.repeat(3000)")
        ask(browser, "", mode="plain")
        until(browser, lambda: shown(browser, ".error"))
        assert "This conversation is full" in shown(browser, ".error")[0]
        browser.find_element(By.ID, "new").click()
        ask(browser, "Hello", mode="documents")
        until(browser, lambda: finished(browser, 1))


@pytest.mark.parametrize(
    ("width", "dark", "phone"), [(1280, False, False), (1280, True, False), (360, False, True), (320, True, True)]
)
def test_axe_finds_no_serious_fault(server: Served, width: int, dark: bool, phone: bool) -> None:
    script = axe()
    with chromium(width=width, dark=dark, phone=phone) as browser:
        opened(browser, server.url)
        found = faults(browser, script)
        ask(browser, "How often may I work from home?", mode="documents")
        until(browser, lambda: finished(browser, 1))
        browser.find_element(By.CSS_SELECTOR, ".cite").click()
        found += faults(browser, script)
        if phone:
            browser.find_element(By.ID, "menu").click()
            until(browser, lambda: browser.find_element(By.ID, "new").is_displayed())
            found += faults(browser, script)
        assert found == []
        width_of_page = browser.execute_script("return document.documentElement.scrollWidth")
        assert width_of_page <= width  # nothing must be scrolled sideways


def test_axe_would_find_a_fault(server: Served) -> None:
    script = axe()
    with chromium() as browser:
        opened(browser, server.url)
        browser.execute_script("document.getElementById('theme').removeAttribute('aria-label');"
                               "document.getElementById('theme').removeAttribute('title')")  # fmt: skip
        assert any(fault.startswith("button-name") for fault in faults(browser, script))


def faults(browser: webdriver.Chrome, script: str) -> list[str]:
    """What axe-core calls serious or critical."""
    browser.execute_script(script)
    result = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    return [
        f"{row['id']}: {node['html'][:120]}"
        for row in result["violations"]
        if row["impact"] in ("serious", "critical")
        for node in row["nodes"]
    ]


def axe() -> str:
    """The text of axe-core."""
    given = os.environ.get("EDGEKIT_AXE")
    if given:
        return Path(given).read_text()
    if not shutil.which("npm"):
        pytest.skip("no axe-core: set EDGEKIT_AXE to its axe.min.js, or install npm")
    folder = Path(tempfile.gettempdir()) / f"edgekit-axe-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    archive = next(folder.glob("axe-core-4*.tgz"), None)
    if archive is None:
        done = subprocess.run(["npm", "pack", "--silent", "axe-core@4"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"axe-core cannot be had: {done.stderr[-200:]}")
        archive = next(folder.glob("axe-core-4*.tgz"))
    with tarfile.open(archive) as packed:
        content = packed.extractfile("package/axe.min.js")
        assert content is not None
        return content.read().decode()
