"""The page of mistakes, tried in a real browser: what it counts, opens, remembers and refuses.

Any Chromium that is installed does; where there is none, these tests are skipped. The page must
never complain in the browser's console, and never ask another computer for anything.
"""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cifar_lib.data import CAT, CLASSES, DOG, ImageSet
from cifar_lib.evaluate import confusion_matrix
from cifar_lib.explain import grad_cam
from cifar_lib.model import ResNet, WeightsInfo, save_model
from notebooks.course import mistakes
from notebooks.course.answers import Network, StoredAnswers
from notebooks.course.mistakes import NetworkAnswers, mistakes_page
from notebooks.course.reference import RESULTS
from notebooks.course.stand_in import generate_stand_in
from scripts import build_pages
from scripts import mistakes_page as write_page

pytestmark = pytest.mark.xdist_group("browser")  # one browser for all of them

ROOT = Path(__file__).parent.parent
REAL_PAGE = ROOT / "docs" / "mistakes.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SHIP, PLANE = CLASSES.index("ship"), CLASSES.index("airplane")
FIRST_ID = 1000  # the test image at position k has the id 1000 + k


# A small set, and two networks that answer on it. The label of image k is k % 10, so the cats are
# 1003, 1013, 1023 and so on, the dogs 1005, 1015, 1025 and so on.


def likely(answers: dict[int, dict[int, float]], size: int = 100) -> torch.Tensor:
    """Logits (size, 10) with the probabilities that are given, {position: {class: probability}}.

    Whatever they leave goes to all other classes alike; an image not named is surely recognised.
    """
    probabilities = torch.empty(size, 10)
    for position in range(size):
        given = answers.get(position, {position % 10: 0.99})
        probabilities[position] = (1 - sum(given.values())) / (10 - len(given))
        for of_class, probability in given.items():
            probabilities[position, of_class] = probability
    return probabilities.log()


FIRST = {
    3: {DOG: 0.60, CAT: 0.30},
    13: {DOG: 0.90, CAT: 0.05},
    23: {DOG: 0.70, CAT: 0.10},
    33: {CAT: 0.50, DOG: 0.45},  # correct, nearly misclassified as dog
    43: {CAT: 0.55, DOG: 0.35},
    5: {CAT: 0.80, DOG: 0.10},
    8: {PLANE: 0.55, SHIP: 0.40},
}
SECOND = {13: {DOG: 0.65, CAT: 0.30}, 53: {DOG: 0.85, CAT: 0.10}, 15: {CAT: 0.70, DOG: 0.20}}
SAID = ("label", "guess", "both", "neither")
VOTES = pd.DataFrame(
    [
        (FIRST_ID + 13, "cat", "dog", 1, 3, 1, 0),
        (FIRST_ID + 23, "cat", "dog", 5, 0, 0, 0),
    ],
    columns=["index", "label", "guess", *(f"votes_{said}" for said in SAID)],
).set_index("index")


@pytest.fixture(scope="module")
def sets() -> tuple[ImageSet, ImageSet]:
    """Training and test images."""
    train, test = generate_stand_in(50, 100, seed=5)
    labels = torch.arange(100) % 10
    return train, replace(test, labels=labels, ids=tuple(range(FIRST_ID, FIRST_ID + 100)))


def network(name: str, answers: dict[int, dict[int, float]]) -> NetworkAnswers:
    """A network of temperature 2 with all that can be known about it."""
    logits = 2 * likely(answers)
    wrong = (logits.argmax(1) != torch.arange(100) % 10).nonzero()[:, 0]
    heat = torch.zeros(len(wrong), 2, 8, 8)
    heat[:, 0, 0, 0] = heat[:, 1, 7, 7] = 1  # upper left for the answer, lower right for the label
    return NetworkAnswers(
        name,
        logits,
        temperature=2.0,
        mirrored=logits.roll(1, dims=1),  # of the next class, just as surely
        mistakes=wrong,
        nearest=(wrong[:, None] + torch.arange(5)) % 50,
        cosines=torch.linspace(0.9, 0.5, 5).expand(len(wrong), 5),
        heat=heat,
    )


@pytest.fixture(scope="module")
def one(sets) -> str:
    return mistakes_page(*sets, [network("first", FIRST)], VOTES)


@pytest.fixture(scope="module")
def two(sets) -> str:
    networks = [network("first", FIRST), network("second", SECOND)]
    return mistakes_page(*sets, networks, VOTES)


# The browser.


@pytest.fixture(scope="module")
def tab() -> Iterator:
    """The one tab of a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=found, args=["--disable-gpu"])
        tab = browser.new_page()
        tab.set_default_timeout(5000)
        yield tab
        browser.close()


@pytest.fixture
def visit(tab, tmp_path) -> Iterator[Callable]:
    """Open a page, given as HTML or as a file, at an address such as #cat-dog."""
    complaints, requests = [], []
    listeners = {
        "console": lambda message: complaints.append(message.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def open_page(source: str | Path, address: str = "", width: int = 1280):
        file = source
        if isinstance(source, str):
            file = tmp_path / "page.html"
            file.write_text(source, encoding="utf-8")
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto("about:blank")  # else another address of the same file wouldn't load it anew
        tab.goto(file.as_uri() + address)
        tab.wait_for_selector("[tabindex='0'], iframe")  # drawn
        return tab

    yield open_page
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert complaints == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data", "about"}


def cell(page, label: str, answer: str):
    return page.get_by_role("button", name=re.compile(f"^{label} misclassified as {answer}: "))


def listed(page, part: str = "mistakes") -> list[int]:
    """The numbers of the images that are listed, in their order."""
    return [int(text) for text in page.locator(f"#{part} b").all_inner_texts()]


def ids(*positions: int) -> list[int]:
    return [FIRST_ID + position for position in positions]


def drawn_on(page, canvas: str) -> np.ndarray:
    """What is drawn on a canvas, uint8 (384, 384, 3)."""
    png = page.evaluate(f"document.getElementById('{canvas}').toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def address(page) -> str:
    return page.evaluate("location.hash")


def close(page) -> None:
    """Close the enlarged image, and wait until the page has noticed."""
    shown = address(page)
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: not url.endswith(shown))


# What is counted and listed.


@pytest.mark.parametrize(("k", "answers"), [(0, FIRST), (1, SECOND)])
def test_every_cell_lists_as_many_images_as_the_confusion_matrix_counts(
    visit, two, sets, k, answers
):
    page = visit(two, f"#all&network={k}")
    matrix = confusion_matrix(likely(answers), sets[1].labels)
    assert len(listed(page)) == matrix.sum() - matrix.trace()
    rows = [row.split("\t") for row in page.locator("#matrix tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == list(CLASSES)
    counts = np.array([[int(text.replace("·", "0")) for text in row[1:]] for row in rows])
    assert np.array_equal(counts, matrix)

    cells = zip(*(counts - np.diag(counts.diagonal())).nonzero(), strict=True)
    for label, answer in [*cells, (SHIP, CAT)]:
        button = cell(page, CLASSES[label], CLASSES[answer])
        button.click()
        assert len(listed(page)) == counts[label, answer]
        assert button.get_attribute("aria-pressed") == "true"


def test_rows_columns_and_the_corner_list_all_that_belongs_to_them(visit, one):
    page = visit(one)
    page.locator("#matrix tbody").get_by_role("button", name="cat", exact=True).click()
    assert listed(page) == ids(13, 23, 3)
    page.locator("#matrix thead").get_by_role("button", name="cat", exact=True).click()
    assert listed(page) == ids(5)
    page.get_by_role("button", name="all", exact=True).click()
    assert listed(page) == ids(13, 5, 23, 3, 8)
    assert page.locator("[aria-pressed=true]").count() == 1


def test_cats_misclassified_as_dogs_come_first_and_can_be_sorted(visit, one):
    page = visit(one)
    assert page.locator("#tiles-title").inner_text() == "cat misclassified as dog: 3 mistakes"
    assert listed(page) == ids(13, 23, 3)
    page.get_by_label("Order").select_option("narrowest lead first")
    assert listed(page) == ids(3, 23, 13)
    page.get_by_label("Order").select_option("by number")
    assert listed(page) == ids(3, 13, 23)


def test_near_ties_that_were_right_come_with_the_slider_and_count_as_no_mistakes(visit, one):
    page = visit(one)
    slider = page.get_by_label("Near ties")
    assert listed(page, "near-ties") == []
    slider.fill("6")
    assert listed(page, "near-ties") == ids(33) and listed(page) == ids(13, 23, 3)
    slider.fill("30")
    assert listed(page, "near-ties") == ids(43, 33)  # the surest first
    assert cell(page, "cat", "dog").inner_text() == "3"
    cell(page, "dog", "cat").click()
    assert listed(page, "near-ties") == []


def test_images_that_look_alike_can_be_sorted_to_the_front(visit, sets):
    train, test = sets
    images = test.images.clone()
    images[23] = images[77] // 2  # the same picture, darker
    page = visit(mistakes_page(train, replace(test, images=images), [network("first", FIRST)]))
    page.get_by_label("Order").select_option("closest look-alike first")
    assert listed(page)[0] == FIRST_ID + 23
    page.locator("#mistakes button").first.click()
    text = page.locator("#look-alike").inner_text()
    assert (
        f"test image {FIRST_ID + 77}, labelled horse, correctly classified, similarity 1.00" in text
    )

    # The look-alike was a horse to the network, the image itself a dog.
    close(page)
    page.get_by_label("Only if the look-alike").check()
    assert FIRST_ID + 23 in listed(page)
    assert "differs=on" in address(page)


def test_images_whose_look_alike_has_the_same_prediction_can_be_left_out(visit, sets):
    train, test = sets
    images = test.images.clone()
    images[3] = images[13] // 2  # two cats that look alike, both misclassified as dogs
    images[23] = train.images[7] // 2  # a training image's prediction isn't known
    page = visit(mistakes_page(train, replace(test, images=images), [network("first", FIRST)]))
    assert listed(page) == ids(13, 23, 3)
    page.get_by_label("Only if the look-alike").check()
    assert listed(page) == []
    assert cell(page, "cat", "dog").inner_text() == "·"


def test_votes_mark_a_doubted_label_and_can_be_asked_for(visit, one):
    page = visit(one)
    marked = page.locator("#mistakes li", has_text="label?")
    assert marked.locator("b").all_inner_texts() == [str(FIRST_ID + 13)]
    page.get_by_label("Only labels that a majority").check()
    assert listed(page) == ids(13) and cell(page, "cat", "dog").inner_text() == "1"
    page.locator("#mistakes button").click()
    words = "suggested. 1 said cat (the label), 3 dog, 1 both, 0 neither."
    assert page.locator("#votes").inner_text().endswith(words)


# One image, closer.


def test_an_image_opens_with_its_probabilities_its_mirror_image_and_its_neighbours(visit, one):
    page = visit(one)
    page.get_by_role("button", name=f"Test image {FIRST_ID + 3}:").click()
    title = f"Test image {FIRST_ID + 3}: labelled cat, misclassified as dog, 60 %"
    assert page.locator("#closer-title").inner_text() == title
    rows = page.locator("#shares tr").all_inner_texts()
    assert len(rows) == 11
    assert [row.split("\t") for row in rows if "cat" in row or "dog" in row] == [
        ["cat (label)", "30.0 %"],
        ["dog", "60.0 % ◀ prediction"],
    ]
    assert page.locator("#mirrored").inner_text() == "Mirror image: frog, 60 %."
    captions = page.locator("#nearest figcaption").all_inner_texts()
    assert [caption.split(", ")[1] for caption in captions] == [
        f"cosine {cosine:.2f}" for cosine in (0.9, 0.8, 0.7, 0.6, 0.5)
    ]
    assert all(c.get_attribute("aria-label") for c in page.locator("#nearest canvas").all())


def test_heat_lies_over_the_picture_as_strongly_as_the_slider_says(visit, one):
    page = visit(one, f"#{FIRST_ID + 3}")
    heat = page.locator("#heat")
    assert heat.is_hidden()

    def brightest_corner() -> str:
        pixels = drawn_on(page, "heat").sum(2)
        return "upper left" if pixels[5, 5] > pixels[-5, -5] else "lower right"

    page.get_by_label("dog, the prediction").check()
    assert heat.is_visible() and brightest_corner() == "upper left"
    page.get_by_label("cat, the label").check()
    assert brightest_corner() == "lower right"
    page.get_by_label("opacity").fill("80")
    assert heat.evaluate("canvas => canvas.style.opacity") == "0.8"
    page.get_by_label("no heat map").check()
    assert heat.is_hidden()


def test_a_picture_is_the_images_and_its_pixels_show_at_a_key(visit, one, sets):
    page = visit(one, f"#{FIRST_ID + 3}")

    smooth = drawn_on(page, "large")
    page.keyboard.press("p")
    pixels = drawn_on(page, "large")
    squares = pixels.reshape(32, 12, 32, 12, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    assert not (smooth.reshape(squares.shape) == squares[:, :1, :, :1]).all()
    image = sets[1].images[3].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(squares[:, 0, :, 0] - image).mean() < 12  # but for WebP's losses


# The keyboard, and the address.


def test_the_keyboard_reaches_everything(visit, one):
    page = visit(one)
    focused = "document.activeElement"
    cell(page, "cat", "dog").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(f"{focused}.ariaLabel") == "cat misclassified as deer: 0"
    page.keyboard.press("ArrowLeft")  # over the diagonal
    assert page.evaluate(f"{focused}.ariaLabel") == "cat misclassified as bird: 0"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.locator("#mistakes button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert f"image {FIRST_ID + 23}" in page.locator("#closer-title").inner_text()
    page.keyboard.press("ArrowRight")
    assert f"image {FIRST_ID + 3}" in page.locator("#closer-title").inner_text()
    assert page.get_by_label("next image").is_disabled()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert f"image {FIRST_ID + 13}" in page.locator("#closer-title").inner_text()
    page.keyboard.press("Escape")
    page.wait_for_selector("#closer", state="hidden")
    page.wait_for_selector(f"[aria-label*='image {FIRST_ID + 13}']:focus")
    outline = f"getComputedStyle({focused}).outlineStyle"
    assert page.evaluate(outline) == "solid"
    stops = page.locator("#matrix button[tabindex='0'], .tiles button[tabindex='0']")
    assert stops.count() == 2  # one each


def test_an_address_leads_to_a_cell_an_image_and_the_choices(visit, two):
    page = visit(two, "#dog-cat")
    assert listed(page) == ids(5)
    page = visit(two, "#any-dog&network=1&order=index")
    assert listed(page) == ids(13, 53) and page.get_by_label("second", exact=True).is_checked()
    page = visit(two, f"#{FIRST_ID + 5}")
    assert f"image {FIRST_ID + 5}" in page.locator("#closer-title").inner_text()
    close(page)
    assert listed(page) == ids(5) and address(page) == "#dog-cat"


def test_what_is_looked_at_can_be_linked_to_and_gone_back_from(visit, two):
    page = visit(two)
    assert address(page) == ""
    cell(page, "ship", "airplane").click()
    page.get_by_label("Near ties").fill("10")
    assert address(page) == "#ship-airplane&margin=10"
    page.locator("#mistakes button").click()
    assert address(page) == f"#{FIRST_ID + 8}&margin=10"
    page.go_back()
    page.wait_for_selector("#closer", state="hidden")
    assert address(page) == "#ship-airplane&margin=10"
    page.locator("#matrix tbody").get_by_role("button", name="cat", exact=True).click()
    page.locator("#mistakes button").first.click()
    linked = address(page)
    page = visit(two, linked)
    close(page)
    assert listed(page) == ids(13, 23, 3) and address(page) == "#cat-any&margin=10"


def test_a_wrong_address_shows_the_beginning_and_a_number_gets_an_answer(visit, two):
    for wrong in ("#5", "#cat-cat", "#unicorn-dog&network=7&order=x", "#%&=&&", "#__proto__&name="):
        page = visit(two, wrong)
        assert listed(page) == ids(13, 23, 3) and page.locator("#closer").is_hidden(), wrong
        assert ("5 isn't here" in page.locator("#message").inner_text()) == (wrong == "#5")


def test_an_image_can_be_asked_for_by_number(visit, one):
    page = visit(one)
    page.get_by_label("Test image number").fill("7")
    page.keyboard.press("Enter")
    assert "Test image 7 isn't here" in page.locator("#message").inner_text()
    page.get_by_label("Test image number").fill(str(FIRST_ID + 8))
    page.keyboard.press("Enter")
    assert "labelled ship, misclassified as airplane" in page.locator("#closer-title").inner_text()


# One network, two, and none that errs.


def test_two_networks_can_be_compared(visit, two):
    page = visit(two)
    whose = page.locator("[name=whose]")
    whose.select_option("that both make")
    assert listed(page) == ids(13) and cell(page, "cat", "dog").inner_text() == "1"
    whose.select_option("that only this network makes")
    assert listed(page) == ids(23, 3)
    page.get_by_label("second", exact=True).check()
    assert listed(page) == ids(53)

    # The first network is right about 1053: the page shows what both say.
    page.locator("#mistakes button").click()
    cat, dog = page.locator("#shares tr", has_text=re.compile("cat|dog")).all_inner_texts()
    assert cat.split("\t")[1:] == ["99.0 % ◀ prediction", "10.0 %"]
    assert dog.split("\t")[2] == "85.0 % ◀ prediction"
    assert "of second" in page.locator("#nearest h3").inner_text()


def test_with_one_network_there_is_nothing_to_compare(visit, one):
    page = visit(one)
    assert page.locator("[name=whose], [name=network]").count() == 0


def test_what_is_not_known_is_left_out(visit, sets):
    bare = NetworkAnswers("bare", likely(FIRST), temperature=1.0)
    page = visit(mistakes_page(*sets, [bare]), f"#{FIRST_ID + 3}")
    assert page.locator("#heat-of").is_hidden() and page.locator("#nearest figure").count() == 0
    assert page.locator("#mirrored").inner_text() == page.locator("#votes").inner_text() == ""
    assert page.get_by_label("Only labels that a majority").count() == 0


def test_a_class_and_a_network_without_mistakes_say_so(visit, one, sets):
    page = visit(one)
    page.locator("#matrix tbody").get_by_role("button", name="frog", exact=True).click()
    assert (
        page.locator("#tiles-title").inner_text() == "frog misclassified as any other: no mistakes"
    )
    assert "no such mistake" in page.locator("#message").inner_text()
    page = visit(mistakes_page(*sets, [network("flawless", {})]))
    assert "flawless misclassifies none" in page.locator("#message").inner_text()


# Where it is shown, and by whom it is written.


def test_stand_in_data_say_so(visit, one, sets):
    note = "stand-in data: generated images, not CIFAR-10"
    page = visit(mistakes_page(*sets, [network("first", FIRST)], None, note))
    assert page.get_by_text(note).is_visible()
    assert visit(one).locator("header .note").count() == 0


def test_texts_from_outside_stay_texts(visit, sets, monkeypatch):
    hostile = "</script><img src=x onerror=document.title='run'>\"'&amp;{{ 1 }}"
    classes = (*CLASSES[:3], f"cat{hostile}", *CLASSES[4:])
    monkeypatch.setattr(mistakes, "CLASSES", classes)
    votes = VOTES.assign(guess=hostile, label=hostile)
    networks = [network(f"first{hostile}", FIRST), network(f"second{hostile}", SECOND)]
    page = visit(mistakes_page(*sets, networks, votes, hostile), f"#{FIRST_ID + 13}")
    assert f"labelled cat{hostile}" in page.locator("#closer-title").inner_text()
    assert hostile in page.locator("#votes").inner_text()
    assert f"first{hostile}" in page.locator("#shares").inner_text()
    assert hostile in page.locator("header .note").inner_text()
    assert page.title() == "Every mistake at a click"
    assert page.locator("img").count() == 1  # the sprite


def test_it_works_twice_in_a_notebook_and_leaves_its_address_alone(visit, one):
    twice = f"<!doctype html><h1>a notebook</h1>{2 * mistakes.in_frame(one)}"
    page = visit(twice, "#section-6")
    for frame in page.frames[1:]:
        frame.wait_for_selector("#mistakes li")
        cell(frame, "dog", "cat").click()
        frame.locator("#mistakes button").click()
        assert f"image {FIRST_ID + 5}" in frame.locator("#closer-title").inner_text()
    assert address(page) == "#section-6"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window(visit, two, width):
    page = visit(two, "#all", width)
    too_wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(too_wide) == 0
    page.locator("#mistakes button").first.click()
    dialog = (
        "(element => element.scrollWidth - element.clientWidth)(document.querySelector('dialog'))"
    )
    assert page.evaluate(dialog) == 0


def test_where_pillow_writes_no_webp_the_pictures_are_jpeg(visit, sets, monkeypatch):
    monkeypatch.setattr(mistakes.features, "check", lambda _: False)
    source = mistakes_page(*sets, [network("first", FIRST)])
    assert 'src="data:image/jpeg;base64,' in source
    assert listed(visit(source)) == ids(13, 23, 3)


def test_what_a_network_answers_comes_with_heat_maps_and_with_what_is_stored(sets, tmp_path):
    torch.manual_seed(0)
    _, test = sets
    half = (0.5, 0.5, 0.5)
    info = WeightsInfo(recipe="report", epochs=1, data="stand-in data", mean=half, std=half)
    save_model(tmp_path / "model.safetensors", ResNet((1, 1, 1), (16, 16, 16)), info)
    net = Network(tmp_path / "model.safetensors", torch.device("cpu"), "fp32")
    logits = net.predict(test.images)
    known = mistakes.answers_of(net, test, logits, temperature=2.0)
    assert known.name == "report" and known.mirrored is None and known.nearest is None
    guesses = logits.argmax(1)
    assert torch.equal(known.mistakes, (guesses != test.labels).nonzero()[:, 0])

    assert known.heat.shape == (len(known.mistakes), 2, 8, 8)
    last = known.mistakes[-1]
    for of_class, heat in zip((guesses[last], test.labels[last]), known.heat[-1], strict=True):
        image = test.images[last : last + 1]
        whole = grad_cam(net.model, image, of_class[None], info.test_normalization)[0]
        middles = whole.view(8, 4, 8, 4)[:, 1:3, :, 1:3].mean((1, 3))
        assert torch.allclose(heat, middles, atol=1e-5)

    # Once its answers are stored: of the mirror images, and the nearest training images.
    stored = {
        "mistakes": known.mistakes,
        "nearest": torch.zeros(len(known.mistakes), 5, dtype=torch.int64),
        "cosines": torch.ones(len(known.mistakes), 5),
    }
    net.stored = StoredAnswers({"logits": {}}, stored)
    known = mistakes.answers_of(net, test, logits, temperature=2.0)
    assert known.nearest is stored["nearest"] and known.cosines is stored["cosines"]
    mirrored = net.predict(test.images.flip(3))
    assert torch.allclose(known.mirrored, mirrored, atol=1e-4)


# The page of the package's weights.


def test_the_packages_page_has_the_readmes_counts(visit):
    """Of the records, too; where this fails after a change: python -m scripts.mistakes_page."""
    page = visit(REAL_PAGE)
    assert len(listed(page)) == 44
    cell(page, "dog", "cat").click()
    assert len(listed(page)) == 63
    for k, run in enumerate(("report-seed42", "best-seed42")):
        page = visit(REAL_PAGE, f"#all&network={k}")
        rows = [row.split("\t")[1:] for row in page.locator("#matrix tbody tr").all_inner_texts()]
        counts = [[int(text.replace("·", "0")) for text in row] for row in rows]
        metrics = json.loads((RESULTS / run / "metrics.json").read_text(encoding="utf-8"))
        right = sum(counts[c][c] for c in range(10))
        assert right == round(10_000 * metrics["half_precision"]["tta_none"]["accuracy"])
        assert len(listed(page)) == 10_000 - right
    page = visit(REAL_PAGE, "#1227")
    assert "1227: labelled cat, misclassified as dog" in page.locator("#closer-title").inner_text()
    assert page.locator("#nearest figure").count() == 5 and page.locator("#heat-of").is_visible()


def test_the_packages_page_is_small_and_of_the_sources_that_are_here():
    assert REAL_PAGE.stat().st_size <= 3e6
    page = REAL_PAGE.read_text(encoding="utf-8")
    for name in ("mistakes.css", "mistakes.js"):
        source = Path(mistakes.__file__).with_name(name).read_text(encoding="utf-8")
        assert source.strip() in page, f"{name} is newer: python -m scripts.mistakes_page"


@pytest.mark.parametrize("name", ["no/such/", "."])
def test_a_wrong_place_for_the_page_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mistakes_page", "--out", name])
    assert write_page.main() == 2
    assert re.fullmatch(r"error: can't write .*: it names a folder: .*\n", capsys.readouterr().err)


def test_a_stored_notebook_leaves_the_page_out(one, monkeypatch):
    shown = {}
    monkeypatch.setattr(mistakes, "display", lambda data, **more: shown.update(data=data, **more))
    mistakes.show_page(one)
    output = nbformat.v4.new_output(
        "display_data", data=dict(shown["data"]), metadata=shown["metadata"]
    )
    cell = nbformat.v4.new_code_cell(outputs=[output])
    build_pages._leave_out_large(nbformat.v4.new_notebook(cells=[cell]))
    assert list(cell.outputs[0].data) == ["text/plain"]
