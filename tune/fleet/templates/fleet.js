"use strict";
// Texts of the rows are untrusted: they reach the page as text nodes and attribute values only, never as HTML.
const fleet = (() => {
  const ORDER = ["failed", "running", "interrupted", "waiting", "completed"];
  const LONG = 180; // characters of a reason that are shown at once
  const PLAIN = { table: "order of the table", name: "name", status: "status", time: "time", steps: "steps" };
  const at = (id) => document.getElementById(id);
  const make = (tag, name, ...content) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...content);
    return element;
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  const parts = [];
  const scores = new Map(); // key -> title, and whether higher values are better
  let subjects = [], shown = [], written = 0;
  let state = {};

  // ---- reading the parts ----------------------------------------------------------------------------
  const fold = (text) => text.normalize("NFKC").toLowerCase();
  const read = (part) => {
    written = Math.max(written, part.written);
    for (const [key, title, higher] of part.scores) scores.set(key, { title, higher });
    return part.rows.map(([name, status, reason, steps, time, values, report, thumbnail, roles, drawn, seed, prompt]) => ({
      name, status, reason, steps, time, report, thumbnail, roles, drawn, seed,
      scores: new Map(part.scores.map(([key], n) => [key, values[n]]).filter(([, value]) => value !== null)),
      text: fold([name, prompt, reason ?? ""].join("\n")),
    }));
  };

  // ---- numbers --------------------------------------------------------------------------------------
  const number = (value) => {
    if (Number.isInteger(value)) return value.toLocaleString("en").replaceAll(",", "\u202f");
    return Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  };
  const duration = (seconds) => {
    const whole = Math.round(seconds);
    if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
    if (whole < 86400) return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
    return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
  };

  // ---- state: in the address, so that "back" and links return to the same page -----------------------
  const isScore = (key) => scores.has(key);
  const defaultOrder = (sort) => (isScore(sort) && scores.get(sort).higher ? "descending" : sort === "time" || sort === "steps" ? "descending" : "ascending");
  const load = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const sort = given.get("sort") ?? "table";
    const status = given.get("status") ?? "all";
    state = {
      status, sort: sort in PLAIN || isScore(sort) ? sort : "table", query: given.get("find") ?? "",
      size: [24, 60, 120].includes(Number(given.get("size"))) ? Number(given.get("size")) : 24,
      page: Math.max(1, Math.floor(Number(given.get("page"))) || 1),
    };
    state.order = ["ascending", "descending"].includes(given.get("order")) ? given.get("order") : defaultOrder(state.sort);
  };
  const address = () => {
    const kept = new URLSearchParams();
    if (state.status !== "all") kept.set("status", state.status);
    if (state.query) kept.set("find", state.query);
    if (state.sort !== "table") kept.set("sort", state.sort);
    if (state.order !== defaultOrder(state.sort)) kept.set("order", state.order);
    if (state.size !== 24) kept.set("size", state.size);
    if (state.page > 1) kept.set("page", state.page);
    return `#${kept}`;
  };
  const go = (change, { replace = false } = {}) => {
    state = { ...state, page: 1, ...change };
    const target = address();
    if (target === (location.hash || "#")) render();
    else if (replace) location.replace(target); // "back" does not step through the letters of a search
    else location.hash = target; // both raise hashchange, which renders
  };

  // ---- selecting and sorting ------------------------------------------------------------------------
  const value = {
    status: (subject) => ORDER.indexOf(subject.status), time: (subject) => (subject.steps || subject.time ? subject.time : undefined),
    steps: (subject) => subject.steps,
  };
  const select = () => {
    const words = fold(state.query).split(/\s+/).filter(Boolean);
    const found = subjects.filter((subject) => (state.status === "all" || subject.status === state.status) && words.every((word) => subject.text.includes(word)));
    const sign = state.order === "descending" ? -1 : 1;
    if (state.sort === "table") return sign < 0 ? found.reverse() : found;
    if (state.sort === "name") return found.sort((a, b) => sign * collator.compare(a.name, b.name));
    const of = value[state.sort] ?? ((subject) => subject.scores.get(state.sort));
    const keyed = found.map((subject) => [of(subject), subject]);
    // Subjects without a value come last in both orders.
    keyed.sort(([a], [b]) => (a === undefined) - (b === undefined) || (a === undefined ? 0 : sign * (a - b)));
    return keyed.map(([, subject]) => subject);
  };

  // ---- drawing --------------------------------------------------------------------------------------
  const images = (subject) => {
    const strip = make("span", "images");
    for (const role of ["base", "tuned", "real"]) {
      const place = subject.roles.indexOf(role);
      const figure = make("figure", "");
      if (place < 0) figure.append(make("div", "missing"));
      else {
        const image = make("img", "");
        // The thumbnail holds the images side by side; each <img> shows one square of it.
        image.style.objectPosition = subject.roles.length > 1 ? `${(100 * place) / (subject.roles.length - 1)}% 0` : "";
        image.loading = "lazy";
        image.decoding = "async";
        image.alt = role === "real" ? "a training image" : `${role} model: ${subject.drawn || "empty prompt"}, seed ${subject.seed}`;
        image.src = `${subject.thumbnail}?${subject.steps}`;
        figure.append(image);
      }
      figure.append(make("figcaption", "", place < 0 ? `no ${role} image` : role));
      strip.append(figure);
    }
    return strip;
  };
  const reason = (subject) => {
    if (subject.reason.length <= LONG) return make("p", "reason", subject.reason);
    const head = make("summary", "", `${subject.reason.slice(0, LONG)}…`);
    return make("details", "", head, make("p", "reason", subject.reason));
  };
  const card = (subject) => {
    const item = make("li", "subject");
    const name = make("h3", "", make("bdi", "", subject.name));
    const status = make("span", "status", subject.status);
    status.classList.add(ORDER.includes(subject.status) ? subject.status : "other");
    const body = make(subject.report ? "a" : "div", "", make("div", "head", name, status));
    if (subject.report) body.href = subject.report;
    if (subject.thumbnail) body.append(images(subject));
    item.append(body);
    if (subject.scores.size) {
      const line = make("p", "scores");
      for (const [key, { title }] of scores) {
        if (!subject.scores.has(key)) continue;
        line.append(make("span", "", `${title} `, make("b", key === state.sort ? "sorted" : "", number(subject.scores.get(key)))));
      }
      item.append(line);
    }
    if (subject.steps || subject.time) {
      item.append(make("p", "soft", `${number(subject.steps)} steps · ${duration(subject.time)}`));
    }
    if (subject.reason) item.append(reason(subject));
    return item;
  };
  const render = () => {
    shown = select();
    const pages = Math.max(1, Math.ceil(shown.length / state.size));
    state.page = Math.min(state.page, pages);
    const from = (state.page - 1) * state.size;
    const visible = shown.slice(from, from + state.size);
    at("subjects").replaceChildren(...visible.map(card));
    at("subjects").start = from + 1;
    at("nothing").hidden = shown.length > 0;
    const to = number(from + visible.length);
    at("range").textContent = shown.length ? `${number(from + 1)}–${to} of ${number(shown.length)} subjects` : "0 subjects";
    at("pages").textContent = `of ${number(pages)}`;
    at("page").max = pages;
    at("page").value = state.page;
    at("first").disabled = at("previous").disabled = state.page === 1;
    at("last").disabled = at("next").disabled = state.page === pages;
    if (at("query").value !== state.query) at("query").value = state.query;
    at("sort").value = state.sort;
    at("size").value = state.size;
    const down = state.order === "descending";
    at("order").replaceChildren(down ? "↓" : "↑", make("span", "", ` ${state.order}`));
    at("order").setAttribute("aria-label", `Order: ${state.order}`);
    for (const chip of at("statuses").children) chip.setAttribute("aria-pressed", String(chip.dataset.status === state.status));
  };

  // ---- the fixed parts of the page ------------------------------------------------------------------
  const drawFacts = (counts) => {
    const total = subjects.reduce((sum, subject) => sum + subject.time, 0);
    const facts = [`${number(subjects.length)} subjects`, ...[...counts].map(([status, count]) => `${number(count)} ${status}`), `${duration(total)} of compute time`];
    if (counts.has("running") || counts.has("waiting")) facts.push(`written ${new Date(1000 * written).toLocaleString()}`);
    at("facts").textContent = facts.join(" · ");
  };
  const drawMedians = () => {
    for (const [key, { title, higher }] of scores) {
      const measured = subjects.filter((subject) => subject.scores.has(key)).map((subject) => subject.scores.get(key)).sort((a, b) => a - b);
      if (!measured.length) continue;
      const middle = measured.length >> 1;
      const median = measured.length % 2 ? measured[middle] : (measured[middle - 1] + measured[middle]) / 2;
      const [low, high] = [number(measured[0]), number(measured.at(-1))];
      const note = make("small", "", `median of ${number(measured.length)}; best ${higher ? high : low}, worst ${higher ? low : high}`);
      at("medians").append(make("div", "", make("dt", "", title), make("dd", "", number(median)), note));
    }
    at("medians").hidden = at("medians").children.length === 0;
  };
  const drawChips = (counts) => {
    for (const [status, count] of [["all", subjects.length], ...counts]) {
      const chip = make("button", "", `${status} `, make("b", "", number(count)));
      chip.type = "button";
      chip.dataset.status = status;
      chip.addEventListener("click", () => go({ status }));
      at("statuses").append(chip);
    }
  };
  const drawSorts = () => {
    const option = (key, title) => {
      const choice = make("option", "", title);
      choice.value = key;
      return choice;
    };
    at("sort").append(...Object.entries(PLAIN).map(([key, title]) => option(key, title)), ...[...scores].map(([key, { title }]) => option(key, title)));
  };
  const turn = (page) => {
    go({ page });
    at("subjects").scrollIntoView();
  };
  const listen = () => {
    let typing;
    at("query").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => go({ query: at("query").value }, { replace: true }), 150);
    });
    at("controls").addEventListener("submit", (event) => event.preventDefault());
    at("sort").addEventListener("change", () => go({ sort: at("sort").value, order: defaultOrder(at("sort").value) }));
    at("order").addEventListener("click", () => go({ order: state.order === "descending" ? "ascending" : "descending" }));
    at("size").addEventListener("change", () => go({ size: Number(at("size").value) }));
    at("clear").addEventListener("click", () => go({ status: "all", query: "" }));
    const pages = () => Number(at("page").max);
    const steps = { first: () => 1, previous: () => state.page - 1, next: () => state.page + 1, last: pages };
    for (const [id, page] of Object.entries(steps)) at(id).addEventListener("click", () => turn(page()));
    at("page").addEventListener("change", () => turn(Math.min(pages(), Math.max(1, Math.floor(Number(at("page").value)) || 1))));
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
      if (event.key === "/") {
        event.preventDefault();
        at("query").focus();
      } else if (event.key === "ArrowLeft" && state.page > 1) turn(state.page - 1);
      else if (event.key === "ArrowRight" && state.page < pages()) turn(state.page + 1);
    });
    addEventListener("hashchange", () => { load(); render(); });
  };
  const start = (expected) => {
    subjects = parts.flat();
    const missing = Array.from({ length: expected }, (_, n) => n).filter((n) => !parts[n]);
    if (missing.length) {
      at("problem").textContent = `${missing.length} of ${expected} files in the folder "page" beside this file could not be loaded; copy the whole folder of the fleet.`;
      at("problem").hidden = false;
    }
    const counts = new Map([...ORDER, ...new Set(subjects.map((subject) => subject.status))].map((status) => [status, subjects.filter((subject) => subject.status === status).length]).filter(([, count]) => count));
    drawFacts(counts);
    drawMedians();
    drawChips(counts);
    drawSorts();
    listen();
    load();
    render();
  };
  return { add: (n, part) => { parts[n] = read(part); }, start };
})();
