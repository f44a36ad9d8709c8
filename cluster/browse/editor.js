// The dialog for one image: caption, crop, focus point and mask.
let current = null, cropNow = null, focusNow = null, drag = null, cursor = [0.5, 0.5], timer = null, unsaved = null;
const WHOLE = [0, 0, 1, 1];
const tool = () => document.querySelector("[name=tool]:checked").value;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

async function openEditor(row) {
  current = await ask("image", { row });
  const { file, size } = current;
  at("name").textContent = current.name;
  at("facts").textContent = `${file.join("×")} pixels, trained at ${size.join("×")}`;
  cropNow = current.crop;
  focusNow = current.focus;
  cursor = current.focus || [0.5, 0.5];
  at("whole").src = `image/whole/${row}/${version}`;
  at("whole").alt = `The whole image ${current.name}`;
  at("caption").value = current.caption || "";
  showFit();
  showTexts();
  if (!at("editor").open) at("editor").showModal();
  await at("whole").decode().catch(() => {});
  await loadMask();
  draw();
}

function showFit() {
  at("fit").src = `image/fit/${current.row}/${version}`;
  at("fit").alt = `${current.name} as it is trained`;
  at("fit-note").textContent = `At training size, ${current.size.join("×")}` +
    (info.random_crop && !focusNow ? "; random crops are taken inside the crop" : "");
}

function showTexts() {
  const original = current.original || "";
  at("caption-note").textContent = current.caption === current.original ? "" : `In the set: ${original || "no caption"}`;
  if (!current.caption && current.prompt) at("caption-note").textContent += ` Without a caption, “${current.prompt}” is trained.`;
  const tags = (current.caption || "").split(/[,\n]/).map(tag => tag.trim()).filter(Boolean);
  at("chips").replaceChildren(...tags.map(tag => {
    const chip = make("button", `${tag} ×`, { type: "button" });
    chip.setAttribute("aria-label", `Remove the tag ${tag}`);
    chip.addEventListener("click", run(() => save({ remove: tag })));
    return chip;
  }));
  const button = document.querySelector("[data-edit=exclude]");
  button.setAttribute("aria-pressed", String(current.excluded));
  button.textContent = current.excluded ? "Excluded" : "Exclude";
  at("mask-note").textContent = (current.own_mask === "" ? "The mask is removed. " : "") +
    (info.uses_masks ? "" : "Masks are not used: the recipe lacks data.alpha_mask: true.");
}

// Saves one edit of the current image and shows it; `whole` reloads mask and crop.
async function save(wanted) {
  await flush();
  const { row } = current;
  await change(wanted, { rows: [row] });
  if (!at("editor").open || current.row !== row) return;
  const caption = at("caption").value, before = current.caption;
  current = await ask("image", { row });
  cropNow = current.crop;
  focusNow = current.focus;
  if (caption === (before || "") || "caption" in wanted || "remove" in wanted || "reset" in wanted) at("caption").value = current.caption || "";
  showFit();
  showTexts();
  if ("mask" in wanted || "reset" in wanted) await loadMask();
  draw();
}

function draw() {
  const box = cropNow || WHOLE, style = at("box").style;
  const shown = tool() === "mask" ? WHOLE : tool() === "focus" && current.box ? current.box : box;
  style.left = `${100 * shown[0]}%`;
  style.top = `${100 * shown[1]}%`;
  style.width = `${100 * (shown[2] - shown[0])}%`;
  style.height = `${100 * (shown[3] - shown[1])}%`;
  at("corner").hidden = tool() !== "crop";
  at("point").hidden = !focusNow || tool() === "mask";
  if (focusNow) { at("point").style.left = `${100 * focusNow[0]}%`; at("point").style.top = `${100 * focusNow[1]}%`; }
  const wide = at("stage").clientWidth * at("width").value / 100;
  Object.assign(at("brush").style, { left: `${100 * cursor[0]}%`, top: `${100 * cursor[1]}%`, width: `${wide}px`, height: `${wide}px`, margin: `${-wide / 2}px` });
  at("brush").hidden = tool() !== "mask";
  for (const field of document.querySelectorAll("[data-side]")) field.value = (100 * box[field.dataset.side]).toFixed(1);
  for (const field of document.querySelectorAll("[data-axis]")) field.value = focusNow ? (100 * focusNow[field.dataset.axis]).toFixed(1) : "";
  for (const part of document.querySelectorAll("[data-tool]")) part.hidden = part.dataset.tool !== tool();
}

// ---- crop and focus --------------------------------------------------------------------------------------

// The height of a crop, as a fraction, of a width, in the shape of the training size.
function heightOf(width) {
  const { file, size } = current;
  return width * file[0] * size[1] / (size[0] * file[1]);
}

function resized(box, width, height) {
  if (at("locked").checked) {
    width = Math.min(width, 1 - box[0], (1 - box[1]) / heightOf(1));
    height = heightOf(width);
  }
  return [box[0], box[1], clamp(box[0] + Math.max(0.02, width), 0, 1), clamp(box[1] + Math.max(0.02, height), 0, 1)];
}

function moved(box, across, down) {
  const width = box[2] - box[0], height = box[3] - box[1];
  const left = clamp(box[0] + across, 0, 1 - width), top = clamp(box[1] + down, 0, 1 - height);
  return [left, top, left + width, top + height];
}

function isWhole(box) { return box.every((value, k) => Math.abs(value - WHOLE[k]) < 1e-6); }
// Saves an edit once the person pauses; `flush` saves it at once.
function later(wanted) {
  clearTimeout(timer);
  unsaved = wanted;
  timer = setTimeout(run(flush), 350);
}
async function flush() {
  clearTimeout(timer);
  const wanted = unsaved;
  unsaved = null;
  if (wanted) await save(wanted());
}
function cropLater() { later(() => ({ crop: !cropNow || isWhole(cropNow) ? null : cropNow.map(value => clamp(value, 0, 1)) })); }
function focusLater() { later(() => ({ focus: focusNow })); }

function place(event) {
  const area = at("whole").getBoundingClientRect();
  return [clamp((event.clientX - area.left) / area.width, 0, 1), clamp((event.clientY - area.top) / area.height, 0, 1)];
}

at("stage").addEventListener("pointerdown", event => {
  if (!current || event.button) return;
  at("stage").setPointerCapture(event.pointerId);
  at("stage").focus();
  const [x, y] = place(event), box = cropNow || WHOLE, reach = 22 / at("whole").clientWidth;
  if (tool() === "mask") { cursor = [x, y]; drag = { kind: "mask" }; dab(x, y); }
  else if (tool() === "focus") { drag = { kind: "focus" }; focusNow = [x, y]; }
  else if (isWhole(box) || Math.hypot(x - box[2], y - box[3]) > reach) {
    const inside = !isWhole(box) && x > box[0] && x < box[2] && y > box[1] && y < box[3];
    drag = inside ? { kind: "move", x, y, box } : { kind: "new", x, y };
  } else drag = { kind: "size", box };
  draw();
});
at("stage").addEventListener("pointermove", event => {
  const [x, y] = place(event);
  const last = cursor;
  if (tool() === "mask") cursor = [x, y];
  if (!drag) { if (tool() === "mask") draw(); return; }
  if (drag.kind === "mask") dab(x, y, last);
  else if (drag.kind === "focus") focusNow = [x, y];
  else if (drag.kind === "move") cropNow = moved(drag.box, x - drag.x, y - drag.y);
  else if (drag.kind === "size") cropNow = resized(drag.box, x - drag.box[0], y - drag.box[1]);
  else if (Math.hypot(x - drag.x, y - drag.y) > 0.02) cropNow = resized([Math.min(x, drag.x), Math.min(y, drag.y), 0, 0], Math.abs(x - drag.x), Math.abs(y - drag.y));
  draw();
});
at("stage").addEventListener("pointerup", () => {
  const kind = drag?.kind;
  drag = null;
  if (kind === "mask") maskLater();
  else if (kind === "focus") focusLater();
  else if (kind && (kind !== "new" || cropNow !== current.crop)) cropLater();
});

at("stage").addEventListener("keydown", event => {
  const far = event.shiftKey ? 0.05 : 0.01;
  const ways = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] };
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const way = ways[event.key], grow = { "+": far, "=": far, "-": -far }[event.key];
  if (way && tool() === "crop") { cropNow = moved(cropNow || WHOLE, ...way); cropLater(); }
  else if (grow && tool() === "crop") {
    const box = cropNow || WHOLE, wide = box[2] - box[0] + grow, high = box[3] - box[1] + grow;
    cropNow = resized([clamp(box[0] - grow / 2, 0, 1), clamp(box[1] - grow / 2, 0, 1), 0, 0], wide, high);
    cropLater();
  } else if (way && tool() === "focus") { focusNow = (focusNow || [0.5, 0.5]).map((value, k) => clamp(value + way[k], 0, 1)); focusLater(); }
  else if (way) cursor = cursor.map((value, k) => clamp(value + way[k], 0, 1));
  else if (grow && tool() === "mask") at("width").value = Number(at("width").value) + 100 * grow;
  else if (event.key === " " && tool() === "mask") { dab(...cursor); maskLater(); }
  else return;
  event.preventDefault();
  draw();
});

// ---- mask ------------------------------------------------------------------------------------------------

// The canvas is red where the mask leaves out; its alpha is 255 minus the mask's grey value.
async function loadMask() {
  const { row } = current, image = new Image(), canvas = at("paint");
  image.src = `image/mask/${row}/${version}`;
  await image.decode();
  if (current.row !== row) return;
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < pixels.data.length; k += 4) {
    pixels.data[k + 3] = 255 - pixels.data[k];
    pixels.data[k] = 255;
    pixels.data[k + 1] = pixels.data[k + 2] = 0;
  }
  pen.putImageData(pixels, 0, 0);
}

// Paints at a point, or from the last point to it.
function dab(x, y, from = [x, y]) {
  const canvas = at("paint"), pen = canvas.getContext("2d");
  pen.globalCompositeOperation = document.querySelector("[name=brush]:checked").value === "hide" ? "source-over" : "destination-out";
  pen.strokeStyle = "#f00";
  pen.lineCap = "round";
  pen.lineWidth = canvas.width * at("width").value / 100;
  pen.beginPath();
  pen.moveTo(from[0] * canvas.width, from[1] * canvas.height);
  pen.lineTo(x * canvas.width, y * canvas.height);
  pen.stroke();
}

function maskFile() {
  const source = at("paint"), canvas = make("canvas", "", { width: source.width, height: source.height });
  const pen = canvas.getContext("2d"), pixels = source.getContext("2d").getImageData(0, 0, source.width, source.height);
  for (let k = 0; k < pixels.data.length; k += 4) {
    pixels.data[k] = pixels.data[k + 1] = pixels.data[k + 2] = 255 - pixels.data[k + 3];
    pixels.data[k + 3] = 255;
  }
  pen.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
}
function maskLater() { later(() => ({ mask: maskFile() })); }

// ---- buttons and fields ----------------------------------------------------------------------------------

function isCaptionNew() { return at("caption").value.trim() !== (current.caption || ""); }

async function go(by) {
  await flush();
  const rows = cards.map(made => made.row.row), k = rows.indexOf(current.row) + by;
  if (isCaptionNew()) await save({ caption: at("caption").value });
  if (k < 0 || k >= rows.length) return say(`The ${k < 0 ? "first" : "last"} image of this page`);
  move(k, false);
  await openEditor(rows[k]);
}

const edits = {
  close: () => at("editor").close(),
  previous: () => go(-1),
  next: () => go(1),
  save: () => save({ caption: at("caption").value }),
  exclude: () => save({ excluded: !current.excluded }),
  reset: () => save({ reset: true }),
  "no-crop": () => save({ crop: null }),
  "no-focus": () => save({ focus: null }),
  "no-mask": () => save({ mask: "" }),
  "own-mask": () => save({ mask: null }),
  fill: () => { const canvas = at("paint"), pen = canvas.getContext("2d"); pen.globalCompositeOperation = "source-over"; pen.fillStyle = "#f00"; pen.fillRect(0, 0, canvas.width, canvas.height); return save({ mask: maskFile() }); },
};
at("editor").addEventListener("click", event => {
  const button = event.target.closest("[data-edit]");
  if (button) run(edits[button.dataset.edit])();
});
at("editor").addEventListener("change", event => {
  const field = event.target;
  if (field.name === "tool" || field.name === "brush" || field.id === "width") draw();
  if (field.dataset.side) {
    const box = [...(cropNow || WHOLE)];
    box[field.dataset.side] = clamp(field.value / 100, 0, 1);
    if (box[2] - box[0] > 0.001 && box[3] - box[1] > 0.001) { cropNow = box; cropLater(); }
    draw();
  }
  if (field.dataset.axis) {
    focusNow = [...(focusNow || [0.5, 0.5])];
    focusNow[field.dataset.axis] = clamp(field.value / 100, 0, 1);
    focusLater();
    draw();
  }
});
at("editor").addEventListener("keydown", event => {
  if (event.key === "Enter" && event.ctrlKey) run(edits.save)();
  else if (event.altKey && event.key === "ArrowLeft") run(go)(-1);
  else if (event.altKey && event.key === "ArrowRight") run(go)(1);
  else return;
  event.preventDefault();
});
at("editor").addEventListener("close", run(async () => {
  await flush();
  if (current && isCaptionNew()) await change({ caption: at("caption").value }, { rows: [current.row] });
  if (mode === "images" && cards.length) cards[active].focus();
  else if (mode === "steps") await showSteps();
}));
