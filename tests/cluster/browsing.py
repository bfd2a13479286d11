"""Looking at the cluster's pages as a person does: in a browser, through tunnels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCREENSHOTS = "MSHNET_SCREENSHOTS"
"""Folder for pictures of what was seen; unset: none are kept."""
PAGE_S = 90


def absent() -> str:
    """What this machine lacks for it; empty if nothing."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return ""
    return "no browser here: sudo apt-get install -y --no-install-recommends chromium chromium-driver"


@contextmanager
def browser(home: Path) -> Iterator[Any]:
    """Chromium without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1500,1000"),
        *("--no-first-run", "--disable-background-networking", f"--user-data-dir={home}"),
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(PAGE_S)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for_text(driver: Any, *texts: str) -> None:
    """Until the page shows them all."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def shown(driver: Any) -> bool:
        body = driver.find_element(By.TAG_NAME, "body").text
        return all(text in body for text in texts)

    try:
        WebDriverWait(driver, PAGE_S, ignored_exceptions=[_stale()]).until(shown)
    except Exception as error:
        picture(driver, "not-seen")
        body = driver.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"expected {texts} on {driver.title!r}, found:\n{body[:3000]}") from error


def _stale() -> Any:
    from selenium.common.exceptions import WebDriverException

    return WebDriverException


def picture(driver: Any, name: str) -> None:
    """Keep what is seen, where SCREENSHOTS says so."""
    if folder := os.environ.get(SCREENSHOTS):
        Path(folder).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))
