// Draws versions and their verdicts from a plain value. Whatever stands in it only becomes text nodes, never HTML.
const root = element.querySelector(".versions");
// A mark and a word for each verdict: no meaning hangs on a color.
const MARKS = { pass: "✓", fail: "✗", undecided: "?" };
const WORDS = { pass: "Pass", fail: "Fail", undecided: "Undecided" };
const COLUMNS = ["metric", "value", "threshold", "margin", "bounds", "n", "why"];
const HEADINGS = ["", "metric", "value", "threshold", "margin", "95 % bounds", "n", "why"];

const part = (name, kind, ...inside) => {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  node.append(...inside);
  return node;
};

const badge = (verdict) => {
  const known = verdict in MARKS ? verdict : "none";
  const node = part("span", `verdict ${known}`, part("b", "", MARKS[known] ?? "–"), WORDS[known] ?? "Not judged");
  node.firstChild.setAttribute("aria-hidden", "true");
  return node;
};

const checks = (rows) => {
  const head = part("tr", "", ...HEADINGS.map((text) => {
    const cell = part("th", "", text || "verdict");
    cell.scope = "col";
    return cell;
  }));
  const body = rows.map((row) => part(
    "tr",
    row.verdict,
    part("td", "", badge(row.verdict)),
    ...COLUMNS.map((name, at) => {
      const cell = part("td", name, name === "metric" ? part("code", "", row[name]) : row[name]);
      cell.dataset.heading = HEADINGS[at + 1];
      return cell;
    }),
  ));
  return part("div", "scroll", part("table", "", part("thead", "", head), part("tbody", "", ...body)));
};

const card = (version) => {
  const node = part("details", "version");
  node.id = version.id;
  const aliases = version.aliases.map((alias) => part("span", "alias", alias));
  if (version.origin) aliases.push(part("span", "origin", version.origin));
  const name = part("span", "name", `Version ${version.number}`);
  const head = part("summary", "", name, part("code", "", version.digest), ...aliases, badge(version.verdict));
  const headline = part("span", "headline");
  window.experiments.say(headline, version.headline);
  head.append(headline);
  node.append(head, part("p", "facts", version.facts.join(" · ")));
  if (version.checks.length) node.append(checks(version.checks));
  for (const note of version.notes) node.append(part("p", "asked", `Not asked: ${note}`));
  node.addEventListener("toggle", () => {
    if (node.open && node.dataset.drawn) history.replaceState(null, "", `#${node.id}`);
  });
  return node;
};

let drawn = "";
const fill = () => {
  const { note, versions } = props.value;
  if (JSON.stringify(props.value) === drawn) return; // what is open stays open
  drawn = JSON.stringify(props.value);
  const nodes = versions.map(card);
  const line = part("p", "none");
  window.experiments.say(line, note);
  root.replaceChildren(...(note ? [line] : []), ...nodes);
  const judged = nodes[versions.findIndex((version) => version.checks.length > 0)];
  const wanted = nodes.find((node) => `#${node.id}` === location.hash) ?? judged ?? nodes[0];
  if (wanted) wanted.open = true;
  if (wanted && location.hash === `#${wanted.id}`) wanted.scrollIntoView();
  setTimeout(() => nodes.forEach((node) => { node.dataset.drawn = "yes"; }), 0);
};
fill();
watch("value", fill);
