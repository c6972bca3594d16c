// What happens at a click.
//
// The data come with the page (mistakes.py). What is shown follows from the fields of two forms,
// `choices` and `view`, and from two variables, `cell` and `opened`. A click changes one of these
// and draws what it concerns anew. Text goes into the page as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { classes, networks, images, pictures } = data;
const imageByIndex = new Map(images.map((image) => [String(image.index), image]));
const choices = byId("choices");
const view = byId("view");
const closer = byId("closer");
const initialChoices = chosen();

// Which cell of the confusion matrix is listed: a label and an answer; null stands for all of them.
const initialCell = { label: classes.indexOf("cat"), answer: classes.indexOf("dog") };
let cell = initialCell;
// Which image is looked at more closely, or null.
let opened = null;

// Inside of a notebook the address is the notebook's: it is left alone.
const hasAddress = window.parent === window;

// ---- What the current network makes of an image ----

function network() {
  return Number(choices.elements.network?.value ?? 0);
}

function answerTo(image, k = network()) {
  return image.answers[k];
}

function isWrong(image, k = network()) {
  return answerTo(image, k).guess !== image.label;
}

/** How sure the network is of its answer, and how far that is ahead of the runner-up. */
function confidence(image) {
  const { guess, shares } = answerTo(image);
  return shares[guess] / data.sharesInOne;
}

function lead(image) {
  const { runnerUp, shares } = answerTo(image);
  return confidence(image) - shares[runnerUp] / data.sharesInOne;
}

/** Whether no majority, of the five people who saw the image, chose its label alone. */
function isDoubted(image) {
  return image.votes !== null && image.votes.counts[0] < 3;
}

// ---- Which images are listed ----

const orders = {
  confidence: (a, b) => confidence(b) - confidence(a),
  margin: (a, b) => lead(a) - lead(b),
  "look-alike": (a, b) => b.lookAlike[1] - a.lookAlike[1],
  index: () => 0, // as they come
};

/** The mistakes of the current network that are asked for, of all cells of the matrix. */
function mistakes() {
  const wanted = {
    any: () => true,
    all: (image) => networks.every((_, k) => isWrong(image, k)),
    only: (image) => networks.every((_, k) => k === network() || !isWrong(image, k)),
  }[choices.elements.whose?.value ?? "any"];
  return images.filter((image) => isWrong(image) && wanted(image) && passes(image));
}

/** The correct predictions that lead by less than the slider says. */
function nearTies() {
  const least = Number(choices.elements.margin.value) / 100;
  return images.filter((image) => !isWrong(image) && lead(image) < least && passes(image));
}

/** Whether an image passes the two filters. */
function passes(image) {
  const { doubted, differs } = choices.elements;
  const passesDoubt = !doubted?.checked || isDoubted(image);
  return passesDoubt && (!differs.checked || differsFromLookAlike(image));
}

/** Whether the look-alike is a test image that the network puts into another class. */
function differsFromLookAlike(image) {
  const [set, index, label] = pictures[image.lookAlike[0]];
  if (set !== "test") return false; // nothing is known of training images
  const other = imageByIndex.get(String(index));
  const guess = other ? answerTo(other).guess : label; // test images not on the page are correct
  return guess !== answerTo(image).guess;
}

/** Which column lists an image: its predicted class or, if that is correct, the runner-up. */
function columnOf(image) {
  const { guess, runnerUp } = answerTo(image);
  return isWrong(image) ? guess : runnerUp;
}

function inCell(image) {
  const isInRow = cell.label === null || cell.label === image.label;
  return isInRow && (cell.answer === null || cell.answer === columnOf(image));
}

/** The mistakes and the near ties that are listed, each in the order that is chosen. */
function listed() {
  const order = orders[choices.elements.order.value];
  return [mistakes(), nearTies()].map((list) => list.filter(inCell).sort(order));
}

// ---- Words ----

function percent(share, digits = 0) {
  return `${((100 * share) / data.sharesInOne).toFixed(digits)} %`;
}

function wordsOfCell(adverb = "") {
  const label = cell.label === null ? "any class" : classes[cell.label];
  const other = cell.label === null ? "another" : "any other";
  const answer = cell.answer === null ? other : classes[cell.answer];
  return `${label} ${adverb}misclassified as ${answer}`;
}

function wordsOfAnswer(image, k) {
  const { guess, shares } = answerTo(image, k);
  const how = guess === image.label ? "correctly classified" : "misclassified";
  return `${how} as ${classes[guess]}, ${percent(shares[guess])}`;
}

function wordsOf(image) {
  const doubt = isDoubted(image) ? ", a label that no majority confirmed" : "";
  return `Test image ${image.index}: ${classes[image.label]}, ${wordsOfAnswer(image)}${doubt}`;
}

// ---- Elements and pictures ----

/** Make an element with these properties and children; a child is an element or a text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const small = make("canvas", { width: 32, height: 32 });

/** Draw a picture onto a canvas: enlarged smoothly, or with pixels as they are. */
function draw(canvas, number, smooth = true) {
  // Cut it out of the sprite first, or smoothing would mix in the pictures beside it.
  const left = 32 * (number % data.columns);
  const top = 32 * Math.floor(number / data.columns);
  small.getContext("2d").drawImage(byId("sprite"), left, top, 32, 32, 0, 0, 32, 32);
  enlarge(canvas, small, smooth);
}

function enlarge(canvas, source, smooth) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = smooth;
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
}

/** Make a picture that says `words` to those who don't see it; none where others say it already. */
function picture(number, side, words) {
  const looks = words ? { role: "img", "aria-label": words } : { "aria-hidden": "true" };
  const canvas = make("canvas", { width: side, height: side, ...looks });
  draw(canvas, number);
  return canvas;
}

// ---- The confusion matrix, which is the menu ----

/** Make the buttons once: a corner, names above and to the left, and the cells. */
function makeMatrix() {
  const everyClass = classes.map((_, k) => k);
  const head = make("tr", {}, matrixButton("th", null, null, "all"));
  head.append(...everyClass.map((k) => matrixButton("th", null, k, classes[k])));
  const rows = everyClass.map((label) => {
    const row = make("tr", {}, matrixButton("th", label, null, classes[label]));
    row.append(...everyClass.map((answer) => matrixButton("td", label, answer, "")));
    return row;
  });
  byId("matrix").append(make("thead", {}, head), make("tbody", {}, ...rows));
}

function matrixButton(tag, label, answer, text) {
  if (label !== null && label === answer) {
    return make("td", { className: "right" });
  }
  const button = make("button", { type: "button", tabIndex: -1 }, text);
  button.cell = { label, answer };
  button.addEventListener("click", () => choose(button.cell));
  return make(tag, {}, button);
}

/** The buttons row by row; null on the diagonal. */
function matrixButtons() {
  return [...byId("matrix").querySelectorAll("td, th")].map((place) => place.firstElementChild);
}

function matrixCells() {
  return matrixButtons().flatMap((button) => button?.cell ?? []);
}

function drawMatrix() {
  const counts = classes.map(() => classes.map(() => 0));
  for (const image of mistakes()) counts[image.label][answerTo(image).guess] += 1;
  const largest = Math.max(1, ...counts.flat());
  for (const button of matrixButtons().filter((button) => button !== null)) {
    const { label, answer } = button.cell;
    const isChosen = label === cell.label && answer === cell.answer;
    button.setAttribute("aria-pressed", isChosen);
    if (isChosen) makeTabStop(button, matrixButtons());
    if (label === null || answer === null) continue;
    const count = counts[label][answer];
    button.textContent = count || "·";
    button.style.setProperty("--share", count / largest);
    const words = `${classes[label]} misclassified as ${classes[answer]}: ${count}`;
    button.setAttribute("aria-label", words);
  }
  const { matrix } = networks[network()];
  byId("matrix")
    .querySelectorAll(".right")
    .forEach((place, k) => (place.textContent = matrix[k][k]));
}

// ---- The list of images ----

function drawTiles() {
  const [wrong, nearlyWrong] = listed();
  const count = wrong.length === 1 ? "1 mistake" : `${wrong.length || "no"} mistakes`;
  byId("tiles-title").textContent = `${wordsOfCell()}: ${count}`;
  byId("message").textContent = message(wrong);
  byId("mistakes").replaceChildren(...wrong.map(tile));

  const points = `${choices.elements.margin.value} points`;
  choices.elements.lead.value = points;
  byId("near-ties-title").textContent = nearlyWrong.length
    ? `${wordsOfCell("nearly ")}, correct by less than ${points}: ${nearlyWrong.length}`
    : "";
  byId("near-ties").replaceChildren(...nearlyWrong.map(tile));
  const first = document.querySelector(".tiles button");
  if (first) makeTabStop(first, tileButtons());
}

function message(wrong) {
  if (networks[network()].mistakes === 0) {
    return `${networks[network()].name} misclassifies none of these images.`;
  }
  return wrong.length ? "" : "There is no such mistake.";
}

function tile(image) {
  const { guess, shares } = answerTo(image);
  const canvas = picture(image.picture, 128, ""); // the button has the words
  const button = make("button", { type: "button", "aria-label": wordsOf(image) }, canvas);
  button.append(
    make("b", {}, String(image.index)),
    make("span", {}, `${classes[guess]} ${percent(shares[guess])}`),
    make("span", {}, isWrong(image) ? `not ${classes[image.label]}` : "✓ correct"),
  );
  if (choices.elements.order.value === "look-alike") {
    const [number] = image.lookAlike;
    const like = `like ${nameOfPicture(number)}, labelled ${classes[pictures[number][2]]}`;
    button.append(picture(number, 128, ""), make("span", {}, like));
  }
  if (isDoubted(image)) {
    const { counts, label, guess } = image.votes;
    const doubt = `label? ${counts[0]} of 5 ${counts[0] === 1 ? "says" : "say"} ${label}, ${counts[1]} ${counts[1] === 1 ? "says" : "say"} ${guess}`;
    button.append(make("span", { className: "doubted" }, doubt));
  }
  button.image = image;
  button.addEventListener("click", () => open(image));
  return make("li", {}, button);
}

function tileButtons() {
  return [...document.querySelectorAll(".tiles button")];
}

// ---- One image, closer ----

function drawCloser() {
  const image = opened;
  byId("closer-title").textContent =
    `Test image ${image.index}: labelled ${classes[image.label]}, ${wordsOfAnswer(image)}`;
  const list = listed().flat();
  byId("before").disabled = neighbourIn(list, -1) === undefined;
  byId("after").disabled = neighbourIn(list, 1) === undefined;

  // Some things are known of mistakes alone. They are shown for the current network or, if that is
  // correct, for another one.
  const everyNetwork = networks.map((_, k) => k);
  const k = [network(), ...everyNetwork].find((k) => isWrong(image, k)) ?? network();
  drawLarge(k);
  drawShares();
  const mirrored = everyNetwork.map(wordsOfMirrored).filter((words) => words);
  byId("mirrored").textContent = mirrored.length ? `Mirror image: ${mirrored.join("; ")}.` : "";
  byId("votes").textContent = wordsOfVotes(image.votes);
  byId("nearest").replaceChildren(...nearest(k));
  byId("look-alike").replaceChildren(...lookAlike());
}

function neighbourIn(list, step) {
  const at = list.indexOf(opened);
  return at < 0 ? undefined : list[at + step];
}

function nameOf(k) {
  return networks.length > 1 ? ` of ${networks[k].name}` : "";
}

/** Draw the picture, and the heat map of network k that is chosen over it. */
function drawLarge(k) {
  const { guess, heat } = answerTo(opened, k);
  byId("large").setAttribute("aria-label", `${wordsOf(opened)}, enlarged`);
  draw(byId("large"), opened.picture, !view.elements.pixels.checked);

  byId("heat-of").hidden = heat === undefined;
  byId("heat-of").querySelector("legend").textContent = `Grad-CAM${nameOf(k)}: evidence for`;
  const [answer, label] = byId("heat-of").querySelectorAll("span");
  answer.textContent = `${classes[guess]}, the prediction`;
  label.textContent = `${classes[opened.label]}, the label`;

  const which = view.elements.heat.value;
  const isDrawn = heat !== undefined && which !== "none";
  byId("heat").hidden = !isDrawn;
  if (isDrawn) drawHeat(heat[which]);
}

/** Draw a heat map of 8 x 8 hexadecimal digits, enlarged smoothly. */
function drawHeat(digits) {
  const cells = make("canvas", { width: 8, height: 8 });
  const context = cells.getContext("2d");
  [...digits].forEach((digit, i) => {
    context.fillStyle = data.heatColours[parseInt(digit, 16)];
    context.fillRect(i % 8, Math.floor(i / 8), 1, 1);
  });
  enlarge(byId("heat"), cells, true);
  byId("heat").style.opacity = view.elements.strength.value / 100;
}

/** Draw the ten calibrated probabilities, one column per network. */
function drawShares() {
  const names = networks.map(({ name }) => make("th", { scope: "col" }, name));
  const head = make("tr", {}, make("th", { scope: "col" }, "calibrated probability"), ...names);
  const rows = classes.map((name, c) => {
    const isLabel = c === opened.label;
    const cells = opened.answers.map(({ guess, shares }) => {
      const answered = c === guess ? " ◀ prediction" : "";
      const share = make("td", {}, `${percent(shares[c], 1)}${answered}`);
      share.style.setProperty("--share", shares[c] / data.sharesInOne);
      share.classList.toggle("marked", c === guess);
      return share;
    });
    const title = make("th", { scope: "row" }, isLabel ? `${name} (label)` : name);
    title.classList.toggle("marked", isLabel);
    return make("tr", {}, title, ...cells);
  });
  byId("shares").replaceChildren(head, ...rows);
}

function wordsOfMirrored(k) {
  const shares = answerTo(opened, k).mirroredShares;
  if (shares === undefined) return "";
  const guess = shares.indexOf(Math.max(...shares));
  const network = networks.length > 1 ? ` (${networks[k].name})` : "";
  return `${classes[guess]}, ${percent(shares[guess])}${network}`;
}

function wordsOfVotes(votes) {
  if (votes === null) {
    return images.some((image) => image.votes) ? "Nobody was asked about this image's label." : "";
  }
  const [label, guess, both, neither] = votes.counts;
  return (
    `Five people were asked whether they see the label's class or a class that an algorithm ` +
    `suggested. ${label} said ${votes.label} (the label), ${guess} ${votes.guess}, ${both} both, ` +
    `${neither} neither.`
  );
}

function nearest(k) {
  const found = answerTo(opened, k).nearest;
  if (found === undefined) return [];
  const figures = found.map(([number, cosine]) => {
    const words = `${classes[pictures[number][2]]}, cosine ${cosine.toFixed(2)}`;
    return framed(number, `${nameOfPicture(number)}: ${words}`, words);
  });
  const title = `Nearest training images by the features${nameOf(k)}`;
  return [make("h3", {}, title), make("div", { className: "row" }, ...figures)];
}

function lookAlike() {
  const [number, likeness] = opened.lookAlike;
  const [set, index, label] = pictures[number];
  const image = set === "test" ? imageByIndex.get(String(index)) : undefined;
  const name = nameOfPicture(number);
  const answer = image ? wordsOfAnswer(image) : set === "test" ? "correctly classified" : "";
  const words = [name, `labelled ${classes[label]}`, answer, `similarity ${likeness.toFixed(2)}`];
  const figure = framed(number, name, words.filter((word) => word).join(", "));
  if (image) {
    const button = make("button", { type: "button" }, `open ${index}`);
    button.addEventListener("click", () => open(image));
    figure.append(button);
  }
  const title = "Look-alike among all images, found by pixels";
  return [make("h3", {}, title), make("div", { className: "row" }, figure)];
}

/** Such as "test image 1227". */
function nameOfPicture(number) {
  const [set, index] = pictures[number];
  return `${set} image ${index}`;
}

function framed(number, words, caption) {
  return make("figure", {}, picture(number, 128, words), make("figcaption", {}, caption));
}

// ---- What changes ----

function choose(newCell) {
  cell = newCell;
  drawMatrix();
  drawTiles();
  remember();

  // In a narrow window the images are below the menu, out of sight.
  const title = byId("tiles-title");
  if (title.getBoundingClientRect().top > window.innerHeight - 150) title.scrollIntoView();
}

function open(image, how = closer.open ? "replaceState" : "pushState") {
  opened = image;
  byId("message").textContent = "";
  drawCloser();
  if (!closer.open) closer.showModal();
  remember(how);
}

function openNumber(text) {
  const image = imageByIndex.get(text.trim());
  if (image) open(image);
  else sayAbsent(text);
}

function sayAbsent(index) {
  byId("message").textContent =
    `Test image ${index} isn't here, because it is neither a mistake nor a near tie.`;
}

choices.addEventListener("input", () => {
  drawMatrix();
  drawTiles();
  remember("replaceState");
});
byId("number").addEventListener("change", (event) => openNumber(event.target.value));

view.addEventListener("input", drawCloser);
byId("before").addEventListener("click", () => step(-1));
byId("after").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => closer.close());

function step(by) {
  const image = neighbourIn(listed().flat(), by);
  if (image) open(image);
}

closer.addEventListener("close", () => {
  if (opened === null) return;
  const button = tileButtons().find((button) => button.image === opened);
  opened = null;
  remember();
  if (button) {
    makeTabStop(button, tileButtons());
    button.focus();
  }
});

// ---- Keys ----

document.addEventListener("keydown", (event) => {
  if (!closer.open || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target.matches("[type=radio], [type=range]")) return; // these need the arrows
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
  if (event.key === "p") view.elements.pixels.click();
});

byId("matrix").addEventListener("keydown", (event) => {
  walk(event, matrixButtons(), classes.length + 1);
});

for (const list of document.querySelectorAll(".tiles")) {
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")];
    const top = buttons[0].offsetTop;
    walk(event, buttons, buttons.filter((button) => button.offsetTop === top).length);
  });
}

/** Let the arrow keys move through a grid of buttons, over gaps (null). */
function walk(event, buttons, columns) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const by = steps[event.key];
  if (by === undefined) return;
  let at = buttons.indexOf(document.activeElement) + by;
  while (buttons[at] === null) at += by;
  if (buttons[at] === undefined) return;
  event.preventDefault();
  makeTabStop(buttons[at], buttons);
  buttons[at].focus();
}

/** Make this button the one of its grid that the Tab key stops at. */
function makeTabStop(button, buttons) {
  for (const other of buttons) if (other) other.tabIndex = other === button ? 0 : -1;
}

// ---- The address: #cat-dog, #cat-any, #all or #1227, and choices other than the initial ones ----

function chosen() {
  return Object.fromEntries(new FormData(choices));
}

function nameOfCell({ label, answer }) {
  if (label === null && answer === null) return "all";
  return [label, answer].map((c) => classes[c] ?? "any").join("-");
}

/** The cell of this name, or undefined. */
function cellOfName(name) {
  return matrixCells().find((candidate) => nameOfCell(candidate) === name);
}

function ownCell(image) {
  return { label: image.label, answer: columnOf(image) };
}

function address() {
  const all = chosen();
  const changed = Object.keys(all).filter((name) => all[name] !== initialChoices[name]);
  const settings = new URLSearchParams(changed.map((name) => [name, all[name]]));
  const isElsewhere = opened && nameOfCell(cell) !== nameOfCell(ownCell(opened));
  if (isElsewhere) settings.set("in", nameOfCell(cell));
  const place = encodeURIComponent(opened ? opened.index : nameOfCell(cell));
  return settings.size ? `#${place}&${settings}` : `#${place}`;
}

/** Write the address, as a new entry of the browser's history or in place of the last one. */
function remember(how = "pushState") {
  if (hasAddress && address() !== location.hash) history[how](null, "", address());
}

/** Show what the address says: at the beginning, and when somebody goes back or follows a link. */
function followAddress() {
  const asked = new URLSearchParams(`place=${location.hash.slice(1)}`);
  choices.reset();
  for (const [name, value] of asked) {
    const field = choices.elements.namedItem(name);
    if (field === null) continue;
    if (field.type === "checkbox") field.checked = true;
    else field.value = value;
    if (field.selectedIndex === -1) field.selectedIndex = 0; // no such option
  }

  const place = asked.get("place");
  const image = imageByIndex.get(place);
  const own = image && ownCell(image);
  cell = cellOfName(asked.get("in") ?? place) ?? own ?? initialCell;
  drawMatrix();
  drawTiles();
  if (image) open(image, "replaceState");
  else {
    opened = null;
    closer.close();
    if (/^\d+$/.test(place)) sayAbsent(place);
  }
}

window.addEventListener("hashchange", followAddress);
byId("sprite").decode().then(() => {
  makeMatrix();
  followAddress();
});
