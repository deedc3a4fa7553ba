// Draws the curves of the chosen runs: a plot for each measure, one crosshair and one range over all of them. Lines are made once and then get new points: a tab beside a running training does not grow. A line's look is its class's: the style sheet has a color for each paper, and a pattern of dashes for those who do not see colors.
const root = element.querySelector(".curves");
const legend = root.querySelector(".legend");
const field = (name) => root.querySelector(`.tools .${name}`);
const LOOKS = 6; // kinds of lines, `.look-0` and so on: as many as there may be runs
const HEIGHT = 260;
const EDGE = { left: 56, right: 12, top: 10, bottom: 28 };
const AT = { steps: 0, tokens: 1, minutes: 2, value: 3 }; // places in a point
const MARGIN = 24; // around the saved picture, pixels
const SHARP = 2; // pixels of the saved picture for one on the page
const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font-family", "font-size"];
const SHORTEST = 8; // pixels of a drag that zooms
const EVERY = { running: 5000, idle: 30000 }; // milliseconds between two looks for news
const written = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 });
const looks = new Map(); // run → its look, which it keeps whatever joins or leaves
const plots = new Map(); // measure → its plot
let shown = { chosen: [], measures: [], runs: [], plots: [], differences: [], note: "" };
let ui = ""; // where the MLflow UI is, if it may be known here
let place = null; // of the crosshair, in units of the horizontal axis; null: nowhere
let range = null; // of the zoom, in units of the horizontal axis
let address = "";

const svg = (name, attributes = {}, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};

const part = (name, kind, ...inside) => {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  node.append(...inside);
  return node;
};

const choose = (before) => {
  const runs = shown.runs.map(({ run }) => run);
  const kept = runs.filter((run) => before.includes(run));
  const taken = new Set(kept.map((run) => looks.get(run)));
  for (const run of runs.filter((each) => !kept.includes(each))) {
    let look = looks.get(run) ?? (parseInt(run, 16) || 0) % LOOKS;
    while (taken.has(look)) look = (look + 1) % LOOKS;
    looks.set(run, look);
    taken.add(look);
  }
};

const over = () => field("over").value;
const across = (point) => point[AT[over()]];

// A scale from values to pixels, with about `count` round values to name.
const scale = (low, high, from, to, count) => {
  const top = Math.max(high, low + 1e-9);
  const power = 10 ** Math.floor(Math.log10((top - low) / count));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor * count >= top - low);
  const [first, last] = [Math.floor(low / step), Math.ceil(top / step)];
  const ticks = Array.from({ length: last - first + 1 }, (_, at) => (first + at) * step);
  const place = (value) => from + (to - from) * (value / step - first) / (last - first);
  const value = (pixel) => step * (first + (last - first) * (pixel - from) / (to - from));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const text = (tick) => (Math.abs(top) >= 1e4 ? written.format(tick) : tick.toFixed(Math.min(digits, 8)));
  return { ticks, place, value, text };
};

// The same for logarithms: one, two, five and their decades, thinned to about `count`.
const logScale = (low, high, from, to, count) => {
  const [first, last] = [Math.log10(low), Math.log10(Math.max(high, low * 1.0001))];
  const decades = Array.from({ length: Math.floor(last) - Math.floor(first) + 1 }, (_, at) => Math.floor(first) + at);
  const all = decades.flatMap((decade) => [1, 2, 5].map((factor) => factor * 10 ** decade));
  const inside = all.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  const every = Math.ceil(inside.length / Math.max(2, count));
  const even = scale(low, high, from, to, count).ticks.filter((tick) => tick >= low && tick <= high);
  const ticks = inside.length < 3 ? even : inside.filter((_, at) => at % every === 0);
  const place = (value) => from + (to - from) * (Math.log10(value) - first) / (last - first);
  const value = (pixel) => 10 ** (first + (last - first) * (pixel - from) / (to - from));
  return { ticks, place, value, text: (tick) => written.format(tick) };
};

// Means that forget, without the bias of the first ones (Adam's correction).
const smoothed = (points, weight) => {
  let [mean, share] = [0, 0];
  return points.map((point) => {
    mean = weight * mean + (1 - weight) * point[AT.value];
    share = weight * share + (1 - weight);
    return [...point.slice(0, AT.value), mean / share];
  });
};

const key = (run) => {
  const sample = svg("svg", { class: "key", viewBox: "0 0 28 8", "aria-hidden": "true" });
  sample.append(svg("line", { class: `look-${looks.get(run)}`, x1: 0, x2: 28, y1: 4, y2: 4 }));
  return sample;
};

// Draw a part only when what it shows has changed.
const drawn = new Map();
const ifChanged = (name, value, draw) => {
  const now = JSON.stringify(value);
  if (drawn.get(name) === now) return;
  drawn.set(name, now);
  draw();
};

const inLegend = ({ run, id, experiment, name, running, known_as }) => {
  const title = part("span", "name", name);
  const line = part("li", "", key(run), title);
  if (known_as) line.append(part("span", "alias", known_as));
  if (running) line.append(part("span", "running", "running"));
  if (ui && experiment) {
    const link = part("a", "", "MLflow");
    link.href = `${ui}/#/experiments/${experiment}/runs/${id}`;
    link.target = "_blank";
    link.rel = "noreferrer";
    link.setAttribute("aria-label", `${name} in the MLflow UI`);
    line.append(link);
  }
  return line;
};

const drawDifferences = () => {
  const box = root.querySelector(".differences");
  box.hidden = shown.differences.length === 0;
  const head = (text, scope) => {
    const cell = part("th", "", text);
    cell.scope = scope;
    return cell;
  };
  const names = ["setting", ...shown.runs.map(({ name }) => name)];
  box.querySelector("thead").replaceChildren(part("tr", "", ...names.map((name) => head(name, "col"))));
  box.querySelector("tbody").replaceChildren(...shown.differences.map(({ name, values }) => (
    part("tr", "", head(name, "row"), ...values.map((value) => part("td", "", value)))
  )));
};

const newPlot = (measure) => {
  const caption = part("figcaption");
  const drawing = svg("svg", { class: "plot", role: "img" });
  const tip = part("p", "tip");
  const figure = part("figure", "", caption, drawing, tip);
  figure.tabIndex = 0;
  figure.dataset.measure = measure;
  tip.hidden = true;
  const axes = svg("g");
  const cursor = svg("line", { class: "cursor", visibility: "hidden" });
  const band = svg("rect", { class: "band", visibility: "hidden" });
  const lines = svg("g");
  drawing.append(axes, cursor, band, lines);
  const known = new Map(); // run → its two lines
  let x, y, curves = [], width = 0, ticked = "", begun = null;

  const draw = (title, received) => {
    caption.textContent = title;
    const weight = Number(field("smooth").value);
    const [logX, logY] = [field("log-x").checked, field("log-y").checked];
    const visible = (point) => (!logX || across(point) > 0) && (!logY || point[AT.value] > 0)
      && (range === null || (across(point) >= range[0] && across(point) <= range[1]));
    curves = received.map(({ run, name, points }) => {
      const raw = points.filter(visible);
      return { run, name, raw, points: weight > 0 ? smoothed(points, weight).filter(visible) : raw };
    });
    figure.hidden = !curves.some((curve) => curve.points.length);
    width = figure.clientWidth;
    if (width === 0) return;
    const points = curves.flatMap((curve) => [...curve.raw, ...curve.points]);
    const bounds = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    const [right, bottom] = [width - EDGE.right, HEIGHT - EDGE.bottom];
    const [low, high] = range ?? bounds([...(logX ? [] : [0]), ...points.map(across)]);
    x = (logX ? logScale : scale)(low, high, EDGE.left, right, Math.max(2, Math.floor(width / 90)));
    y = (logY ? logScale : scale)(...bounds(points.map((point) => point[AT.value])), bottom, EDGE.top, 5);
    const ticks = JSON.stringify([width, x.ticks, y.ticks]);
    if (ticks !== ticked) {
      ticked = ticks;
      drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      for (const node of [cursor, band]) {
        node.setAttribute("y1", EDGE.top);
        node.setAttribute("y2", bottom);
        node.setAttribute("y", EDGE.top);
        node.setAttribute("height", bottom - EDGE.top);
      }
      axes.replaceChildren(
        ...y.ticks.flatMap((tick) => [
          svg("line", { class: "grid", x1: EDGE.left, x2: right, y1: y.place(tick), y2: y.place(tick) }),
          svg("text", { x: EDGE.left - 8, y: y.place(tick), dy: ".32em", "text-anchor": "end" }, y.text(tick)),
        ]),
        ...x.ticks.map((tick) => svg(
          "text", { x: x.place(tick), y: bottom + 20, "text-anchor": "middle" }, x.text(tick),
        )),
      );
    }
    const path = (of) => of.map((point) => `${x.place(across(point))},${y.place(point[AT.value])}`).join(" ");
    for (const { run, raw, points: line } of curves) {
      if (!known.has(run)) {
        known.set(run, { faint: svg("polyline"), full: svg("polyline") });
        lines.append(known.get(run).faint, known.get(run).full);
      }
      const { faint, full } = known.get(run);
      full.setAttribute("class", `look-${looks.get(run)}`);
      faint.setAttribute("class", `look-${looks.get(run)} faint`);
      full.setAttribute("points", path(line));
      faint.setAttribute("points", weight > 0 ? path(raw.filter((point) => !logY || point[AT.value] > 0)) : "");
    }
    for (const [run, { faint, full }] of known) {
      if (curves.some((curve) => curve.run === run)) continue;
      faint.remove();
      full.remove();
      known.delete(run);
    }
    drawing.setAttribute("aria-label", `${title}, over ${over()}: ${curves.filter((curve) => curve.points.length)
      .map((curve) => `${curve.name} ${written.format(curve.points.at(-1)[AT.value])}`).join("; ")}`);
  };

  const hide = () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };

  // What each run had reached at `wanted`, in units of the axis.
  const show = (wanted) => {
    if (figure.hidden || !x) return;
    const at = Math.min(width - EDGE.right, Math.max(EDGE.left, x.place(wanted)));
    const distance = (point) => Math.abs(across(point) - wanted);
    tip.replaceChildren(part("b", "", `${written.format(wanted)} ${over()}`), ...curves.filter((curve) => curve.points.length)
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

  const inside = (event) => {
    const pixel = event.clientX - drawing.getBoundingClientRect().left;
    return Math.min(width - EDGE.right, Math.max(EDGE.left, pixel));
  };
  drawing.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch" || !x) return;
    begun = inside(event);
    drawing.setPointerCapture(event.pointerId);
  });
  drawing.addEventListener("pointermove", (event) => {
    if (!x) return;
    const at = inside(event);
    look(x.value(at));
    if (begun === null) return;
    band.setAttribute("visibility", Math.abs(at - begun) < SHORTEST ? "hidden" : "visible");
    band.setAttribute("x", Math.min(at, begun));
    band.setAttribute("width", Math.abs(at - begun));
  });
  drawing.addEventListener("pointerup", (event) => {
    const [from, to] = [begun, inside(event)].sort((a, b) => a - b);
    band.setAttribute("visibility", "hidden");
    const dragged = begun !== null && to - from >= SHORTEST;
    begun = null;
    if (dragged) zoom([x.value(from), x.value(to)]);
  });
  drawing.addEventListener("pointercancel", () => { begun = null; band.setAttribute("visibility", "hidden"); });
  drawing.addEventListener("dblclick", () => zoom(null));
  drawing.addEventListener("pointerleave", () => look(null));
  figure.addEventListener("focus", () => tip.setAttribute("aria-live", "polite")); // one of the plots speaks
  figure.addEventListener("blur", () => {
    tip.removeAttribute("aria-live");
    look(null);
  });
  figure.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const [low, high] = x ? [EDGE.left, width - EDGE.right] : [0, 0];
    const at = place === null ? low : x.place(place);
    if (event.key === "Escape") look(null);
    else if (event.key === "0") zoom(null);
    else if (event.key === "+" || event.key === "-") {
      const half = (high - low) * (event.key === "+" ? 0.25 : 1);
      zoom([x.value(Math.max(low, at - half)), x.value(Math.min(high, at + half))]);
    } else if (way) {
      event.preventDefault();
      look(x.value(Math.min(high, Math.max(low, at + way * (high - low) / 50))));
    }
  });
  return { figure, draw, show, hide };
};

// The crosshair lies at the same place of every plot.
const look = (wanted) => {
  place = wanted;
  for (const plot of plots.values()) {
    if (wanted === null) plot.hide();
    else plot.show(wanted);
  }
};

const zoom = (wanted) => {
  range = wanted;
  field("whole").disabled = range === null;
  redraw();
};

const redraw = () => {
  field("smoothing").textContent = Number(field("smooth").value).toFixed(2);
  for (const { measure, title, curves } of shown.plots) plots.get(measure).draw(title, curves);
  if (place !== null) look(place);
};

// Put new data into the plots that are there; make and remove as few as possible.
const fill = (received) => {
  const before = shown.runs.map(({ run }) => run);
  shown = received;
  choose(before);
  window.experiments.say(root.querySelector(".note"), shown.note);
  root.querySelector(".tools").hidden = root.querySelector(".plots").hidden = shown.note !== "";
  ui = received.ui ?? ui;
  const faces = shown.runs.map(({ run }) => looks.get(run));
  ifChanged("legend", [shown.runs, faces, ui], () => legend.replaceChildren(...shown.runs.map(inLegend)));
  ifChanged("differences", [shown.runs, shown.differences], drawDifferences);
  const wanted = shown.plots.map(({ measure }) => measure);
  for (const [measure, { figure }] of plots) {
    if (wanted.includes(measure)) continue;
    figure.remove();
    plots.delete(measure);
  }
  wanted.forEach((measure, at) => {
    if (!plots.has(measure)) plots.set(measure, newPlot(measure));
    const { figure } = plots.get(measure);
    const places = root.querySelector(".plots").children;
    if (places[at] !== figure) root.querySelector(".plots").insertBefore(figure, places[at] ?? null);
  });
  redraw();
  // What is chosen stands in the address, once it is another choice than the one that the page was opened with.
  const now = JSON.stringify([shown.chosen, shown.measures]);
  if (address && address !== now) {
    window.experiments.address({ runs: shown.chosen.join(","), measure: shown.measures.join(",") });
  }
  if (shown.chosen.length || address) address = now;
};

window.experiments.moment = ({ step, tokens }) => {
  if (over() === "steps") look(step);
  if (over() === "tokens") look(tokens);
};

// Every point of the plots, as they were logged.
const csv = () => {
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  const rows = shown.plots.flatMap(({ measure, curves }) => curves.flatMap(({ run, name, points }) => (
    points.map((point) => [quoted(name), run, measure, ...point].join(","))
  )));
  return ["name,run,measure,step,tokens,minutes,value", ...rows, ""].join("\n");
};

field("over").addEventListener("change", () => { place = null; look(null); zoom(null); });
for (const name of ["smooth", "log-y"]) field(name).addEventListener("input", redraw);
field("log-x").addEventListener("input", () => zoom(null)); // a part may begin at 0
field("whole").addEventListener("click", () => zoom(null));
// Save under a name that says which runs are in it.
const save = (blob, kind) => {
  const name = ["curves", ...shown.runs.map((run) => run.name)].join(" ").replace(/[^\p{L}\p{N}._-]+/gu, "-");
  const link = part("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name.slice(0, 100)}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};

// A copy of a drawing that needs no style sheet, at a place of another one.
const copied = (drawing, place) => {
  const copy = drawing.cloneNode(true);
  const [from, to] = [drawing, copy].map((whole) => [whole, ...whole.querySelectorAll("*")]);
  from.forEach((node, at) => {
    const look = getComputedStyle(node);
    for (const name of STYLES) to[at].setAttribute(name, look.getPropertyValue(name));
  });
  for (const [name, value] of Object.entries(place)) copy.setAttribute(name, value);
  for (const node of copy.querySelectorAll(".cursor, .band")) node.remove();
  return copy;
};

// All plots below each other under the legend, on the page's background.
const picture = () => {
  const figures = [...root.querySelectorAll(".plots figure:not([hidden])")];
  const names = [...legend.querySelectorAll(".name")];
  const inner = Math.max(...figures.map((figure) => figure.clientWidth), ...names.map((name) => name.offsetWidth + 40));
  const whole = svg("svg");
  const background = svg("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor });
  whole.append(background);
  let down = MARGIN;
  const write = (node, x) => {
    const { color: fill, fontFamily, fontSize } = getComputedStyle(node);
    const look = { x, y: down + 14, fill, "font-family": fontFamily, "font-size": fontSize };
    whole.append(svg("text", look, node.textContent.replace(/\p{C}/gu, " "))); // some of these XML cannot hold
  };
  for (const name of names) {
    const line = name.parentNode.querySelector(".key");
    whole.append(copied(line, { x: MARGIN, y: down + 5, width: 28, height: 8 }));
    write(name, MARGIN + 40);
    down += 22;
  }
  for (const figure of figures) {
    down += MARGIN / 2;
    write(figure.querySelector("figcaption"), MARGIN);
    down += MARGIN;
    const place = { x: MARGIN, y: down, width: figure.clientWidth, height: HEIGHT };
    whole.append(copied(figure.querySelector(".plot"), place));
    down += HEIGHT;
  }
  whole.setAttribute("width", inner + 2 * MARGIN);
  whole.setAttribute("height", down + MARGIN);
  return whole;
};

field("csv").addEventListener("click", () => save(new Blob([csv()], { type: "text/csv" }), "csv"));
field("png").addEventListener("click", async () => {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(picture()))}`;
  await image.decode();
  const canvas = part("canvas");
  [canvas.width, canvas.height] = [SHARP * image.width, SHARP * image.height];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save(blob, "png"));
});

// Look for news of a running training, more seldom where none runs; not while nobody sees the page.
const follow = async () => {
  if (!element.isConnected) return;
  const running = shown.runs.some((each) => each.running);
  if (document.visibilityState === "visible" && shown.chosen.length) {
    const { chosen, measures, state } = shown;
    const fresh = await server.news({ chosen, measures }).catch(() => null);
    const same = fresh !== null && JSON.stringify([chosen, measures]) === JSON.stringify([shown.chosen, shown.measures]);
    if (same && fresh.note === "") {
      fill(fresh);
      if (fresh.state !== state) trigger("submit");
    }
  }
  setTimeout(follow, running ? EVERY.running : EVERY.idle);
};

new ResizeObserver(redraw).observe(root);
fill(props.value);
watch("value", () => fill(props.value));
setTimeout(follow, EVERY.running);
