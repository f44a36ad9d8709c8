"use strict";
const { images, comparisons, real, votes, store, is_served: isServed } = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", 1: "left", ArrowDown: "equal", 0: "equal", ArrowRight: "right", 2: "right" };
const times = {};
let busy = false;
const past = [];  // positions that were answered on this page, for Back

if (!isServed) {
  try { Object.assign(votes, JSON.parse(localStorage.getItem(store) ?? "{}")); } catch { /* storage is off: votes last until the page is closed */ }
}
let place = next(0);

function next(from) {
  const found = comparisons.findIndex((one, k) => k >= from && !votes[one.id]);
  return found < 0 ? comparisons.findIndex((one) => !votes[one.id]) : found;
}

function show() {
  const one = comparisons[place], count = comparisons.filter((c) => votes[c.id]).length;
  at("place").textContent = `${count} of ${comparisons.length} answered`;
  at("progress").max = comparisons.length;
  at("progress").value = count;
  at("pair").hidden = !one;
  at("end").hidden = Boolean(one);
  at("prompt").textContent = one ? one.prompt : "";
  document.querySelector(".ask").hidden = !one;
  if (one) {
    at("left").src = images[one.images[0]];
    at("right").src = images[one.images[1]];
  }
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.disabled = !one;
    button.setAttribute("aria-pressed", String(Boolean(one) && votes[one.id] === button.dataset.choice));
  }
  document.querySelector("[data-action=back]").disabled = !past.length;
}

async function choose(choice) {
  const one = comparisons[place];
  if (busy || !one) return;
  busy = true;
  try {
    if (isServed) {
      const answer = await fetch("act", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ id: one.id, choice }),
      });
      if (!answer.ok) throw new Error((await answer.json()).error);
    }
    votes[one.id] = choice;
    times[one.id] = new Date().toISOString();
    if (!isServed) {
      try { localStorage.setItem(store, JSON.stringify(votes)); } catch { /* as above */ }
    }
    past.push(place);
    place = next(place + 1);
    at("alert").hidden = true;
    show();
    at("status").textContent = `Saved: ${choice}.` + (place < 0 ? " That was the last comparison." : "");
    if (place < 0) at("end").focus();
  } catch (error) {
    at("alert").textContent = error instanceof TypeError ?
      "The command that serves this page has ended. The votes before this one are saved." : error.message;
    at("alert").hidden = false;
  } finally {
    busy = false;
  }
}

function back() {
  if (busy || !past.length) return;
  place = past.pop();
  show();
  at("status").textContent = "The previous comparison; a new answer replaces the old one.";
}

function save() {
  const lines = comparisons.filter((one) => votes[one.id]).map(({ id, left, right, prompt, seed }) => {
    const winner = { left, right, equal: "equal" }[votes[id]];
    return JSON.stringify({ left, right, prompt, seed, winner, time: times[id] ?? null }) + "\n";
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "votes.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

const ACTIONS = { back, save };
document.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  if (button.dataset.choice) choose(button.dataset.choice);
  else ACTIONS[button.dataset.action]();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (KEYS[event.key]) choose(KEYS[event.key]);
  else if (event.key === "u" || event.key === "Backspace") back();
  else if (event.key === "s" && !isServed) save();
  else return;
  event.preventDefault();
});
for (const [k, uri] of real.entries()) {
  const image = document.createElement("img");
  image.src = uri;
  image.alt = `training image ${k + 1}`;
  at("real").append(image);
}
show();
