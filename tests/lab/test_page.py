"""The report page in headless Chromium, by scripts/check_page.py, which also runs axe-core."""

import pytest
from scripts.check_page import BROWSERS, browsing, check, find_browser

from proxstep.lab.report import write_report
from proxstep.runs.reading import find_runs
from tests.lab.conftest import two_evaluations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None,
        reason=f"the page is looked at in a browser, and none of {', '.join(BROWSERS)} is here",
    ),
]


@pytest.fixture(scope="module")
def browser():
    with browsing(find_browser() or "") as page:
        yield page


@pytest.fixture
def path(make_run, tmp_path):
    sample = {"prompt": "2+2=", "answer": "4", "completion": "4" * 300, "reward": 1.0}
    for name in ("grpo", "isopo", "<b>odd</b>'s"):
        for seed in (0, 1):
            records = two_evaluations(seed)
            for record in records[1:]:
                record["grad_norm"] *= 1 + 30 * (name == "isopo")
            samples = [{"step": step, **sample} for step in (0, 6)]
            make_run(name, seed, records=records, samples=samples, name=f"{name[:3]}-{seed}")
    return write_report(find_runs([tmp_path]), tmp_path / "page.html")


def test_the_page_answers_and_asks_nobody(browser, path):
    browser.open(path)
    assert check(browser) == []


def test_what_the_page_must_not_do_is_seen(browser, path):
    text = path.read_text(encoding="utf-8")
    loose = text.replace("default-src 'none'", "default-src 'none'; img-src *")
    loose = loose.replace("</main>", "<img src='http://127.0.0.1:9/x.png' alt=''></main>")
    path.write_text(loose)
    browser.open(path)
    found = " ".join(check(browser))
    path.write_text(text.replace('path.setAttribute("transform"', 'path.setAttribute("x"'))
    browser.open(path)  # another script than the one whose hash the page allows
    assert "script does not run" in " ".join(check(browser))
    browser.requests.clear()
    browser.errors.clear()
    assert "127.0.0.1" in found
    assert "the console has" in found


def test_without_its_script_the_page_shows_curves_and_their_names(browser, path):
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("<script>")], encoding="utf-8")
    browser.open(path)
    assert browser.run("document.querySelectorAll('.line').length") >= 3
    keys = "[...document.querySelectorAll('.keys li')].filter((li) => li.offsetHeight > 0)"
    assert browser.run(f"{keys}.map((li) => li.textContent)") == ["<b>odd</b>'s", "grpo", "isopo"]
    assert browser.run("document.querySelectorAll('button').length") == 0
