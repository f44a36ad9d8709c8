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
