"use strict";
// The slider selects the step of the tuned images.
for (const slider of document.querySelectorAll("input[data-steps]")) {
  const steps = slider.dataset.steps.split(",");
  const frames = document.querySelectorAll(".panel [data-frame]");
  const output = slider.closest("label").querySelector("output");
  slider.addEventListener("input", () => {
    output.textContent = steps[slider.value];
    for (const frame of frames) {
      if (frame.parentElement.dataset.role === "tuned") frame.hidden = frame.dataset.frame !== slider.value;
    }
  });
}
// A chart shows its values under the pointer or the finger.
for (const plot of document.querySelectorAll("[data-chart]")) {
  const { last, lines } = JSON.parse(plot.dataset.chart);
  const rule = plot.appendChild(document.createElement("b"));
  const tip = plot.appendChild(document.createElement("output"));
  rule.hidden = tip.hidden = true;
  const show = (event) => {
    const box = plot.querySelector("svg").getBoundingClientRect();
    const wanted = ((event.clientX - box.left) / box.width) * last;
    const near = (points) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const found = lines.map((line) => [line.name, near(line.points)]);
    const step = found.reduce((a, b) => (Math.abs(b[1][0] - wanted) < Math.abs(a[1][0] - wanted) ? b : a))[1][0];
    const shown = found.filter(([, point]) => point[0] === step);
    tip.textContent = `step ${step}: ` + shown.map(([n, p]) => (lines.length > 1 ? `${n} ${p[1]}` : p[1])).join(", ");
    const left = (100 * step) / last;
    rule.style.left = `${left}%`;
    tip.style.left = `${left}%`;
    tip.style.transform = `translateX(${-left}%)`;
    rule.hidden = tip.hidden = false;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { rule.hidden = tip.hidden = true; });
}
// Marks and table rows of one thing are highlighted together, under the pointer or with the focus in the row.
const keyed = new Map();
for (const one of document.querySelectorAll("[data-key]")) {
  if (!keyed.has(one.dataset.key)) keyed.set(one.dataset.key, []);
  keyed.get(one.dataset.key).push(one);
}
let lit = [], litKey;
const light = (event) => {
  const key = event.target.closest?.("[data-key]")?.dataset.key;
  if (key === litKey) return;
  litKey = key;
  for (const one of lit) one.classList.remove("lit");
  lit = keyed.get(key) ?? [];
  for (const one of lit) {
    one.classList.add("lit");
    if (one instanceof SVGElement) one.parentNode.append(one);  // above the others
  }
};
if (keyed.size) for (const name of ["pointerover", "focusin"]) document.addEventListener(name, light);
// A click on a heading sorts the rows of its table; empty cells stay last.
for (const button of document.querySelectorAll("th[data-sorts] button")) {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return !x - !y;
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
