"""A real browser for tests of pages, and short words for what they look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER) and not os.environ.get("CI"):
    pytest.skip("no Chromium with chromedriver here (.ci/run installs both)", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser of the module's own; its logs tell what pages write and ask for."""
    assert CHROMIUM and DRIVER, "CI is set: Chromium and chromedriver have to be there (apt-get: chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    # Without a sandbox, as CI often runs as root in a container; the pages come from tests.
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def resize(driver: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def emulate(driver: Any, **features: str) -> None:
    """Let the system prefer something: ``prefers_color_scheme="dark"``."""
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})


def one(driver: Any, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver: Any, selector: str) -> list[str]:
    """Return texts as they are in the document, shown or not."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )
    return found


def written(driver: Any, selector: str) -> list[str]:
    """Return texts with the source of each formula that is drawn in them."""
    script = """return [...document.querySelectorAll(arguments[0])].map(each => {
        const copy = each.cloneNode(true);
        copy.querySelectorAll('math').forEach(formula => formula.replaceWith(formula.getAttribute('alttext')));
        return copy.textContent; })"""
    found: list[str] = driver.execute_script(script, selector)
    return found


def spaced(text: str) -> str:
    return text.replace("\u00a0", " ")


def focused(driver: Any) -> Any:
    return driver.execute_script("return document.activeElement.id || document.activeElement.className")
