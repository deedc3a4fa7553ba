// Draws the curves of the chosen runs, over tokens and over minutes. A line's look is its class's: the style sheet has a color for each paper, and a pattern of dashes for those who do not see colors.
const root = element.querySelector(".curves");
const legend = root.querySelector(".legend");
const LOOKS = 6; // kinds of lines, `.look-0` and so on: as many as there may be runs
const HEIGHT = 300;
const EDGE = { left: 52, right: 12, top: 10, bottom: 28 };
const AT = { steps: 0, tokens: 1, minutes: 2, value: 3 }; // places in a point
const written = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 });
const looks = new Map(); // run → its look, which it keeps whatever joins or leaves
let curves = [];
let address = "";

const svg = (name, attributes, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};

const part = (name, kind, ...inside) => {
  const node = document.createElement(name);
  node.className = kind;
  node.append(...inside);
  return node;
};

const choose = (before) => {
  const runs = curves.map((curve) => curve.run);
  const kept = runs.filter((run) => before.includes(run));
  const taken = new Set(kept.map((run) => looks.get(run)));
  for (const run of runs.filter((each) => !kept.includes(each))) {
    let look = looks.get(run) ?? (parseInt(run, 16) || 0) % LOOKS;
    while (taken.has(look)) look = (look + 1) % LOOKS;
    looks.set(run, look);
    taken.add(look);
  }
};

// A scale from values to pixels, with about `count` round values to name.
const scale = (values, from, to, count) => {
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = Math.max(values.reduce((a, b) => Math.max(a, b), -Infinity), low + 1e-9);
  const power = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor * count >= high - low);
  const [first, last] = [Math.floor(low / step), Math.ceil(high / step)];
  const ticks = Array.from({ length: last - first + 1 }, (_, at) => (first + at) * step);
  const place = (value) => from + (to - from) * (value / step - first) / (last - first);
  const value = (pixel) => step * (first + (last - first) * (pixel - from) / (to - from));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const text = (tick) => (high >= 1e4 ? written.format(tick) : tick.toFixed(digits));
  return { ticks, place, value, text };
};

const plots = [...root.querySelectorAll("figure")].map((figure) => {
  const over = figure.dataset.over;
  const drawing = figure.querySelector("svg");
  const tip = figure.querySelector(".tip");
  let x, y, cursor, width = 0, at = 0;

  const draw = () => {
    width = figure.clientWidth;
    const points = curves.flatMap((curve) => curve.points);
    if (width === 0 || !points.length) return;
    drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const [right, bottom] = [width - EDGE.right, HEIGHT - EDGE.bottom];
    x = scale([0, ...points.map((point) => point[AT[over]])], EDGE.left, right, Math.max(2, Math.floor(width / 90)));
    y = scale(points.map((point) => point[AT.value]), bottom, EDGE.top, 5);
    cursor = svg("line", { class: "cursor", y1: EDGE.top, y2: bottom, visibility: "hidden" });
    drawing.replaceChildren(
      ...y.ticks.flatMap((tick) => [
        svg("line", { class: "grid", x1: EDGE.left, x2: right, y1: y.place(tick), y2: y.place(tick) }),
        svg("text", { x: EDGE.left - 8, y: y.place(tick), dy: ".32em", "text-anchor": "end" }, y.text(tick)),
      ]),
      ...x.ticks.map((tick) => svg(
        "text", { x: x.place(tick), y: bottom + 20, "text-anchor": "middle" }, x.text(tick),
      )),
      cursor,
      ...curves.map((curve) => svg("polyline", {
        class: `look-${looks.get(curve.run)}`,
        points: curve.points.map((point) => `${x.place(point[AT[over]])},${y.place(point[AT.value])}`).join(" "),
      })),
    );
    hide();
  };

  const hide = () => {
    tip.hidden = true;
    at = 0; // keys begin at the first value
    cursor?.setAttribute("visibility", "hidden");
  };

  // What each run had reached at a place: of the pointer, or of the arrow keys.
  const look = (pixel) => {
    if (!curves.length || !x) return;
    at = Math.min(width - EDGE.right, Math.max(EDGE.left, pixel));
    const wanted = x.value(at);
    const distance = (point) => Math.abs(point[AT[over]] - wanted);
    tip.replaceChildren(part("b", "", `${written.format(wanted)} ${over}`), ...curves.filter((curve) => curve.points.length)
      .map((curve) => {
        const point = curve.points.reduce((best, each) => (distance(each) < distance(best) ? each : best));
        return part("span", "", key(curve.run), `${curve.name}: ${written.format(point[AT.value])}`);
      }));
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(at + 12, width - tip.offsetWidth))}px`;
  };

  drawing.addEventListener("pointermove", (event) => look(event.clientX - drawing.getBoundingClientRect().left));
  drawing.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!way) return;
    event.preventDefault();
    look(at + way * width / 50);
  });
  return { over, figure, drawing, draw };
});

const key = (run) => {
  const sample = svg("svg", { class: "key", viewBox: "0 0 28 8", "aria-hidden": "true" });
  sample.append(svg("line", { class: `look-${looks.get(run)}`, x1: 0, x2: 28, y1: 4, y2: 4 }));
  return sample;
};

const fill = () => {
  const { note, title, chosen, measure, curves: received } = props.value;
  const before = curves.map((curve) => curve.run);
  curves = received;
  choose(before);
  window.experiments.say(root.querySelector(".note"), note);
  root.querySelector(".plots").hidden = note !== "";
  legend.replaceChildren(...curves.filter((curve) => curve.points.length).map(({ run, name, points }) => {
    const values = [points[0], points.at(-1)].map((point) => written.format(point[AT.value]));
    return part("li", "", key(run), part("span", "name", name), part("span", "reached", ` ${values.join(" → ")}`));
  }));
  for (const { over, figure, drawing, draw } of plots) {
    const caption = figure.querySelector("figcaption");
    caption.textContent = `${title}, over ${over === "tokens" ? "tokens read" : "minutes of training"}`;
    drawing.setAttribute("aria-label", `${caption.textContent}: ${[...legend.children].map((line) => line.textContent).join("; ")}`);
    draw();
  }
  // What is chosen stands in the address, once it is another choice than the one that the page was opened with.
  const now = JSON.stringify([chosen, measure]);
  if (address && address !== now) window.experiments.address({ runs: chosen.join(","), measure });
  if (chosen.length || address) address = now;
};
new ResizeObserver(() => plots.forEach(({ draw }) => draw())).observe(root);
fill();
watch("value", fill);
