"use strict";
const at = id => document.getElementById(id);
const COUNT = 60;
let info = null, filter = {}, start = 0, total = 0, cards = [], active = 0, anchor = 0, version = 0, mode = "images";
let chosen = new Set(), everything = false;  // selected rows; with `everything`, all of the filter except `chosen`

function make(tag, text = "", properties = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  return Object.assign(made, properties);
}

// Shows a message above an open dialog, which hides the rest of the page.
function toFront(message) {
  const place = document.querySelector("dialog[open]") || document.body;
  if (message.parentElement !== place) place.prepend(message);
}

function say(text) {
  toFront(at("status"));
  at("status").textContent = text;
}

function fail(error) {
  toFront(at("alert"));
  at("alert").textContent = error instanceof TypeError ?
    "The command that serves this page has ended. What you edited before is saved." : error.message;
  at("alert").hidden = false;
}

async function ask(action, more = {}) {
  const answer = await fetch("act", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ action, ...more }) });
  const reply = await answer.json();
  if (!answer.ok) throw new Error(reply.error);
  at("alert").hidden = true;
  if ("can_undo" in reply) {
    version = reply.version;
    document.querySelector("[data-do=undo]").disabled = !reply.can_undo;
    document.querySelector("[data-do=redo]").disabled = !reply.can_redo;
    document.querySelector("[data-do=write]").disabled = reply.edited === 0;
    if (info) at("summary").textContent = `${info.images.toLocaleString("en")} images, ${reply.edited.toLocaleString("en")} edited`;
  }
  return reply;
}

// Runs a request and shows its error.
const run = action => (...values) => Promise.resolve(action(...values)).catch(fail);

function card(row) {
  const made = make("div", "", { className: "card", tabIndex: -1 });
  made.setAttribute("role", "option");
  const image = make("img", "", { loading: "lazy", alt: "" });
  image.addEventListener("error", () => made.classList.add("broken"));
  made.append(image, make("div", "", { className: "badges" }), make("p"));
  fill(made, row);
  return made;
}

function fill(made, row) {
  made.row = row;
  made.className = `card${row.excluded ? " excluded" : ""}`;
  const address = `image/thumb/${row.row}/${version}`;
  if (made.firstChild.dataset.at !== address) { made.firstChild.dataset.at = address; made.firstChild.src = address; }
  const badges = [make("span", row.size.join("×"))];
  if (row.excluded) badges.push(make("span", "excluded", { className: "bad" }));
  if (row.edited) badges.push(make("b", "edited"));
  if (row.masked) badges.push(make("span", "mask"));
  if (row.copies) badges.push(make("span", `copy ${row.copies}`));
  made.children[1].replaceChildren(...badges);
  made.lastChild.textContent = row.caption || "no caption";
  made.title = row.name;
  made.setAttribute("aria-label", `${row.name}, ${row.size.join(" by ")}${row.excluded ? ", excluded" : ""}` +
    `${row.edited ? ", edited" : ""}. ${row.caption || "No caption"}`);
  mark(made);
}

const isChosen = row => everything !== chosen.has(row);
function mark(made) { made.setAttribute("aria-selected", String(isChosen(made.row.row))); }

function showSelection() {
  const count = everything ? total - chosen.size : chosen.size;
  cards.forEach(mark);
  at("selection").hidden = count === 0;
  at("selected").textContent = `${count.toLocaleString("en")} selected`;
}

async function load(from = start, { focus = null, again = false } = {}) {
  const errors = filter.state === "errors";
  at("grid").hidden = errors;
  at("errors").hidden = !errors;
  if (errors) return loadErrors();
  const reply = await ask("page", { filter, start: from, count: COUNT, again });
  start = reply.start;
  total = reply.total;
  cards = reply.rows.map(card);
  at("grid").replaceChildren(...cards);
  active = Math.min(active, Math.max(0, cards.length - 1));
  if (focus !== null) active = focus < 0 ? cards.length - 1 : Math.min(focus, cards.length - 1);
  if (cards.length) cards[active].tabIndex = 0;
  if (focus !== null && cards.length) cards[active].focus();
  const last = start + cards.length;
  at("range").textContent = total ? `${(start + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ` +
    `${total.toLocaleString("en")}` : "No image matches these filters.";
  at("page").value = Math.floor(start / COUNT) + 1;
  at("pages").textContent = Math.max(1, Math.ceil(total / COUNT)).toLocaleString("en");
  document.querySelector("[data-page='-1']").disabled = start === 0;
  document.querySelector("[data-page='1']").disabled = last >= total;
  showSelection();
}

async function loadErrors() {
  const reply = await ask("errors", { start: 0 });
  cards = [];
  at("errors").replaceChildren(...reply.errors.map(([uri, reason]) => {
    const item = make("li");
    item.append(make("strong", uri), make("br"), make("span", reason));
    return item;
  }));
  at("range").textContent = `${reply.total} files cannot be used` + (reply.total ? "" : ": no errors");
  at("selection").hidden = true;
}

async function loadFacets() {
  const found = await ask("facets");
  at("tags").replaceChildren(...found.tags.map(([tag]) => make("option", "", { value: tag })));
  at("tag-count").textContent = `${found.number.toLocaleString("en")} tags`;
  at("tag-list").replaceChildren(...found.tags.slice(0, 60).map(([tag, count]) => {
    const item = make("li"), button = make("button", "", { type: "button" });
    button.dataset.tag = tag;
    button.append(make("span", tag), make("span", count.toLocaleString("en")));
    item.append(button);
    return item;
  }));
  const sizes = at("form").elements.bucket, now = sizes.value;
  sizes.replaceChildren(make("option", "all", { value: "" }),
    ...found.buckets.map(([size, count]) => make("option", `${size.replace("x", "×")} (${count.toLocaleString("en")})`, { value: size })));
  sizes.value = now;
  for (const option of at("form").elements.state.options) {
    if (!option.value) continue;
    option.textContent = `${option.textContent.replace(/ \(.*/, "")} (${found.states[option.value].toLocaleString("en")})`;
  }
}

function apply() {
  filter = {};
  for (const field of at("form").elements) {
    if (!field.name || field.value.trim() === "") continue;
    filter[field.name] = field.type === "number" ? Number(field.value) : field.value.trim();
  }
  const names = Object.keys(filter);
  at("active").textContent = names.length ? names.map(name => `${name}: ${filter[name]}`).join(", ") : "";
  chosen = new Set();
  everything = false;
  return load(0, { again: true });
}

function question(title, label, { second = false, value = "", tags = true } = {}) {
  at("ask-title").textContent = title;
  at("ask-label").textContent = label;
  at("ask-second").hidden = !second;
  at("ask-text").value = value;
  at("ask-text").setAttribute("list", tags ? "tags" : "");
  at("ask-other").value = "";
  at("ask").returnValue = "no";
  at("ask").showModal();
  return new Promise(done => at("ask").addEventListener("close", () => done(
    at("ask").returnValue === "yes" ? (second ? [at("ask-text").value, at("ask-other").value] : at("ask-text").value) : null),
  { once: true }));
}

function target() {
  if (everything) return { filter, without: [...chosen] };
  return { rows: chosen.size ? [...chosen] : cards.length ? [cards[active].row.row] : [] };
}

async function change(wanted, where = target()) {
  const reply = await ask("edit", { ...where, do: wanted });
  update(reply);
  say(`${reply.changed.toLocaleString("en")} ${reply.changed === 1 ? "image" : "images"} changed and saved`);
  return reply;
}

function update(reply) {
  const changed = new Map(reply.rows.map(row => [row.row, row]));
  for (const made of cards) if (changed.has(made.row.row)) fill(made, changed.get(made.row.row));
  if (reply.changed > reply.rows.length) run(load)(start);
  run(loadFacets)();
}

const bulk = {
  async add() { const text = await question("Add tags", "Tags, separated by commas"); if (text) await change({ add: text }); },
  async first() { const text = await question("Add tags in front", "Tags, separated by commas"); if (text) await change({ first: text }); },
  async remove() { const text = await question("Remove tags", "Tags, separated by commas; * stands for anything"); if (text) await change({ remove: text }); },
  async replace() { const pair = await question("Rename a tag", "Old tag", { second: true }); if (pair && pair[0]) await change({ replace: pair }); },
  async caption() {
    const one = !everything && chosen.size < 2 && cards.length ? cards[active].row.caption || "" : "";
    const text = await question("Set the caption", "Caption", { value: one, tags: false });
    if (text !== null) await change({ caption: text });
  },
  async exclude() { await change({ excluded: true }); },
  async include() { await change({ excluded: false }); },
  async toggle() { await change({ excluded: !(cards.length && cards[active].row.excluded) }); },
  async reset() { await change({ reset: true }); },
  async none() { chosen = new Set(); everything = false; showSelection(); },
};

async function undo(action) {
  const reply = await ask(action);
  update(reply);
  if (at("editor").open) await openEditor(current.row);
  say(reply.changed ? `${action === "undo" ? "Undone" : "Repeated"}: ${reply.changed.toLocaleString("en")} images` : `Nothing to ${action}`);
}

function move(to, extend) {
  if (to < 0 && start > 0) return run(load)(start - COUNT, { focus: -1 });
  if (to >= cards.length && start + cards.length < total) return run(load)(start + COUNT, { focus: 0 });
  if (!cards.length) return;
  const next = Math.max(0, Math.min(cards.length - 1, to));
  cards[active].tabIndex = -1;
  cards[next].tabIndex = 0;
  cards[next].focus();
  if (extend && !everything) {
    for (let k = Math.min(anchor, next); k <= Math.max(anchor, next); k++) chosen.add(cards[k].row.row);
    showSelection();
  } else anchor = next;
  active = next;
}

function toggle(row) {
  if (chosen.has(row)) chosen.delete(row); else chosen.add(row);
  showSelection();
}

async function showSteps() {
  const first = Math.max(1, Number(at("first").value) || 1), asked = {};
  showSteps.asked = asked;
  at("steps").replaceChildren();
  say("Computing the steps");
  for (let number = first; number < first + 20; number++) {
    const reply = await ask("step", { number });
    if (showSteps.asked !== asked || mode !== "steps") return;
    const part = make("section", "", { className: "step" }), images = make("div");
    part.append(make("h2", `Step ${number} · ${reply.size.join("×")}`), images);
    reply.images.forEach((one, k) => images.append(stepImage(number, k, one, reply.version)));
    at("steps").append(part);
  }
  say(`Steps ${first} to ${first + 19}`);
}

function stepImage(number, k, one, stamp) {
  const figure = make("figure"), words = make("figcaption", one.caption ?? "trained without a caption");
  figure.append(make("img", "", { src: `image/step/${number}/${k}/${stamp}`, alt: `${one.name} as trained at step ${number}` }));
  if (one.weighted) figure.append(make("img", "", { className: "weights", src: `image/step-weights/${number}/${k}/${stamp}`, alt: "weights of the loss, white is the highest" }));
  words.append(make("small", `${one.name}${one.mirrored ? ", mirrored" : ""}, use ${one.use}`));
  if (one.row !== null) {
    const edit = make("button", "Edit", { type: "button" });
    edit.setAttribute("aria-label", `Edit ${one.name}`);
    edit.addEventListener("click", run(() => openEditor(one.row)));
    words.append(edit);
  }
  figure.append(words);
  return figure;
}

async function setMode(next) {
  mode = next;
  for (const button of document.querySelectorAll("[data-mode]")) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  at("images-view").hidden = mode !== "images";
  at("steps-view").hidden = mode !== "steps";
  if (mode === "steps") return showSteps();
  say("");
  await load(start);
}

async function writeFiles() {
  const yes = await question("Write captions and masks to files?", "Type yes to write them. Each changed caption file is copied to a hidden folder first; crops, focus points and exclusions stay in the table", { tags: false });
  if (yes?.trim().toLowerCase() !== "yes") return;
  const { written } = await ask("write");
  await load(start, { again: true });
  say(`${written.captions} captions and ${written.masks} masks written; ${written.kept} edits stay in the table` +
    (written.backups.length ? `; earlier captions: ${written.backups.join(", ")}` : ""));
}

document.addEventListener("click", event => {
  const button = event.target.closest("button, .card");
  if (!button) return;
  if (button.classList.contains("card")) {
    const k = cards.indexOf(button);
    if (event.shiftKey) move(k, true);
    else { move(k, false); if (event.ctrlKey || event.metaKey) toggle(button.row.row); else if (event.detail === 2) run(openEditor)(button.row.row); }
  } else if (button.dataset.bulk) run(bulk[button.dataset.bulk])();
  else if (button.dataset.do === "help") at("help").showModal();
  else if (button.dataset.do === "write") run(writeFiles)();
  else if (button.dataset.do) run(undo)(button.dataset.do);
  else if (button.dataset.mode) run(setMode)(button.dataset.mode);
  else if (button.dataset.page) run(load)(start + COUNT * Number(button.dataset.page), { focus: 0 });
  else if (button.dataset.steps) run(showSteps)();
  else if (button.dataset.tag !== undefined) { at("tag").value = button.dataset.tag; run(apply)(); }
});
at("form").addEventListener("submit", event => { event.preventDefault(); run(apply)(); });
at("form").addEventListener("reset", () => setTimeout(run(apply)));
at("form").addEventListener("change", event => { if (event.target.tagName === "SELECT" || event.target.id === "tag") run(apply)(); });
at("page").addEventListener("change", () => run(load)((Math.max(1, Number(at("page").value) || 1) - 1) * COUNT, { focus: 0 }));

const KEYS = { t: "add", f: "first", d: "remove", r: "replace", c: "caption", x: "toggle" };
document.addEventListener("keydown", event => {
  const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]):not([type=range]), textarea, select");
  if (document.querySelector("dialog[open]") || typing || event.altKey) return;
  const inGrid = event.target.closest("#grid"), columns = getComputedStyle(at("grid")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowLeft: active - 1, ArrowRight: active + 1, ArrowUp: active - columns, ArrowDown: active + columns, Home: 0, End: cards.length - 1 };
  const key = event.key;
  if ((event.ctrlKey || event.metaKey) && key === "a" && mode === "images") { everything = true; chosen = new Set(); showSelection(); }
  else if ((event.ctrlKey || event.metaKey) && key === "z") run(undo)("undo");
  else if (event.ctrlKey || event.metaKey) return;
  else if (inGrid && key in steps) move(steps[key], event.shiftKey);
  else if (inGrid && key === " ") toggle(cards[active].row.row);
  else if (inGrid && (key === "Enter" || key === "e")) run(openEditor)(cards[active].row.row);
  else if (inGrid && key === "PageDown" && start + cards.length < total) run(load)(start + COUNT, { focus: 0 });
  else if (inGrid && key === "PageUp" && start > 0) run(load)(start - COUNT, { focus: 0 });
  else if (mode === "images" && key === "Escape") bulk.none();
  else if (mode === "images" && KEYS[key]) run(bulk[KEYS[key]])();
  else if (key === "u") run(undo)("undo");
  else if (key === "U") run(undo)("redo");
  else if (key === "?") at("help").showModal();
  else if (key === "g") run(setMode)(mode === "steps" ? "images" : "steps");
  else if (key === "/") { at("filters").open = true; at("text").focus(); }
  else return;
  event.preventDefault();
});

run(async () => {
  info = await ask("open");
  at("title").textContent = info.title;
  document.title = `${info.title} · dreamfleet`;
  at("filters").open = matchMedia("(min-width: 44.01rem)").matches;
  for (const [name, title] of Object.entries(info.modes)) at("modes").append(make("a", title, { href: `${name}/`, className: "mode" }));
  at("summary").textContent = `${info.images.toLocaleString("en")} images, ${info.edited.toLocaleString("en")} edited`;
  await load(0, { focus: 0 });
  document.body.dataset.ready = "yes";
  await loadFacets();
})();
