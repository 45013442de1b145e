"""Chromium opens the demo's page through the proxy, and its WebSocket echoes."""

import os
import shlex
import subprocess

import pytest

from harness import BUILD, FORWARD, PATIENCE, REPO, WSS
from more import Server, need
from test_apps import NodeApp

pytest.importorskip("selenium", reason="needs python3-selenium, see PACKAGES.more")
from selenium import webdriver                                      # noqa: E402
from selenium.webdriver.chrome.service import Service               # noqa: E402
from selenium.webdriver.common.by import By                         # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait             # noqa: E402

SHOTS = BUILD / "screenshots"


class Demo(Server):
    """tests/demo/backend with its page."""

    def __init__(self, place):
        self.place, self.name, self.entry = place, place.name, place.entry
        source = REPO / "tests" / "demo"
        program = BUILD / "demo-backend"
        subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-std=c11", "-D_GNU_SOURCE",
                        "-O2", "-o", f"{program}.{os.getpid()}", source / "backend.c"], check=True)
        os.replace(f"{program}.{os.getpid()}", program)
        self.start([program, "-a", place.host, "-p", place.port, "-v", source / "page.html"])
        self.log.wait("listen")


@pytest.fixture
def demo(place, keeper):
    return keeper(Demo(place()))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium with nothing in its profile; it verifies no certificate. (Each test has a proxy on
    another port, so none finds what another has left.)"""
    options = webdriver.ChromeOptions()
    options.binary_location = need("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", "ignore-certificate-errors", "window-size=900,900",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=Service(need("chromedriver")), options=options)
    driver.set_page_load_timeout(4 * PATIENCE)
    yield driver
    driver.quit()


def until(browser, condition):
    return WebDriverWait(browser, 2 * PATIENCE).until(lambda _: condition())


def text(browser, name):
    return browser.find_element(By.ID, name).text


@pytest.fixture
def page(proxy, demo, browser):
    """The demo's page, once its WebSocket is open."""
    p = proxy(demo, http=FORWARD, listeners=[("127.0.0.1", "0", WSS)])
    browser.get_log("browser")      # of the test before
    browser.get("https://127.0.0.1:%d/" % p.address()[1])
    until(browser, lambda: text(browser, "state").endswith("connected"))
    return p


def keep(browser, name):
    SHOTS.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(SHOTS / f"{name}.png"))


def test_page_connects_and_is_echoed(browser, page):
    assert browser.title == "wssproxy: echo"
    until(browser, lambda: text(browser, "count") == "1")
    assert "Hello!" in text(browser, "log")
    browser.find_element(By.ID, "text").send_keys("ping from a browser: ü ☂")
    browser.find_element(By.ID, "send").click()
    until(browser, lambda: text(browser, "count") == "2")
    lines = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#log li.echo span")]
    assert lines == ["Hello!", "ping from a browser: ü ☂"]
    keep(browser, "echo")
    page.log.wait("open", path="/", status="200")
    page.log.wait("open", path="/echo", status="101")


def test_hundred_messages_are_echoed_in_order(browser, page):
    until(browser, lambda: text(browser, "count") == "1")
    browser.find_element(By.ID, "many").click()
    until(browser, lambda: text(browser, "count") == "101")
    lines = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#log li.echo span")]
    assert lines[-99:] == [f"message {n}" for n in range(2, 101)]
    keep(browser, "hundred")


def test_page_sees_no_error(browser, page):
    until(browser, lambda: text(browser, "count") == "1")
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_closing_by_the_page_is_orderly(browser, page):
    browser.find_element(By.ID, "connect").click()
    until(browser, lambda: text(browser, "state").endswith("closed"))
    until(browser, lambda: "closed, code 1000" in text(browser, "log"))
    line = page.log.wait("open", path="/echo")
    page.log.wait("close", id=line["id"], why="eof")


def test_page_learns_that_the_backend_is_gone_and_connects_again(browser, page, demo):
    until(browser, lambda: text(browser, "count") == "1")
    demo.close()
    until(browser, lambda: "closed, code 1012" in text(browser, "log"))
    again = Demo(demo.place)
    try:
        browser.find_element(By.ID, "connect").click()
        until(browser, lambda: text(browser, "state").endswith("connected"))
    finally:
        again.close()


def test_page_learns_that_it_was_idle(browser, proxy, demo):
    p = proxy(demo, http=FORWARD, head_ms=1000, idle_ms=2000)
    browser.get("https://127.0.0.1:%d/" % p.address()[1])
    until(browser, lambda: "closed, code 1001" in text(browser, "log"))
    p.log.wait("close", why="idle", code="1001")


def test_page_of_40_parts_takes_6_connections(proxy, place, keeper, browser):
    """As many as a browser opens at a time. What it opens ahead of need asks nothing."""
    app = keeper(NodeApp("app.js", place()))
    p = proxy(app, http=FORWARD, listeners=[("127.0.0.1", "0", WSS)])
    browser.get("https://127.0.0.1:%d/parts" % p.address()[1])
    until(browser, lambda: browser.title == "40")
    asked = p.log.all("open")
    assert len([line for line in asked if line["path"].startswith("/part/")]) == 40
    assert len({line["id"].partition(".")[0] for line in asked}) <= 6


def test_resumed_sessions_are_what_a_browser_uses(browser, page):
    """Its second connection resumes the TLS session of the page."""
    browser.refresh()
    until(browser, lambda: text(browser, "state").endswith("connected"))
    page.log.wait("open", resumed="1")
