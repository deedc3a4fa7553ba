// Shows how the service is doing, and asks again every few seconds while the page is seen. Rows are made once and then only get new text: a tab that stays open does not grow.
const root = element.querySelector(".status");
const EVERY = 3000; // milliseconds between two questions
const STATES = { ready: "Ready", "not ready": "Not ready", draining: "Stopping" };
const MARKS = new Map([[true, "✓ holds"], [false, "✗ missed"], [null, ""]]);
const PLACES = { local: "on this machine", modal: "on Modal" };
const rows = new Map(); // parent → key → nodes

const put = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

// The nodes of a row under `parent`, made when the row is first seen.
const row = (parent, key, make) => {
  const known = rows.get(parent) ?? rows.set(parent, new Map()).get(parent);
  if (!known.has(key)) {
    const nodes = make();
    known.set(key, nodes);
    parent.append(...nodes.added);
  }
  return known.get(key);
};

const part = (name, kind) => {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  return node;
};

const term = (list, name, text) => {
  const { group, label, value } = row(list, name, () => {
    const nodes = { group: part("div"), label: part("dt"), value: part("dd") };
    nodes.group.append(nodes.label, nodes.value);
    return { ...nodes, added: [nodes.group] };
  });
  put(label, name);
  put(value, text);
  group.hidden = text === "";
};

const span = (seconds) => {
  if (seconds < 120) return `${seconds} seconds`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} minutes`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} hours` : `${Math.round(seconds / 86400)} days`;
};

const show = (now) => {
  root.dataset.state = now.state;
  put(root.querySelector(".state b"), STATES[now.state]);
  put(root.querySelector(".state span"), `up for ${span(now.up_seconds)}`);
  const who = root.querySelector(".who");
  const alias = now.model.alias ? `, the ${now.model.alias}` : "";
  term(who, "Model", `${now.model.name}${alias}`);
  term(who, "Digest", now.model.digest);
  term(who, "Runtime", now.runtime);
  term(who, "Generates", PLACES[now.served_by] ?? now.served_by);
  term(who, "Circuit breaker", now.breaker);
  term(who, "Deployment", now.deployment);
  term(who, "Software", now.version);
  const load = root.querySelector(".load");
  term(load, "Slots in use", now.slots === null ? "" : `${now.active} of ${now.slots}`);
  term(load, "Waiting", now.waiting === null ? "" : String(now.waiting));
  term(load, "Requests open", `${now.open}, at most ${now.capacity} streams`);
  const stories = now.stories === 1 ? "1 story" : `${now.stories.toLocaleString("en-US")} stories`;
  put(root.querySelector(".window"), `Of ${stories} that completed in the last ${span(now.window_seconds)}.`);
  const figures = root.querySelector(".figures");
  for (const each of now.figures) {
    const { line, cells } = row(figures, each.metric, () => {
      const nodes = { line: part("tr"), cells: [part("th"), ...["value", "threshold", "verdict"].map((kind) => part("td", kind))] };
      nodes.cells[0].scope = "row";
      nodes.line.append(...nodes.cells);
      return { ...nodes, added: [nodes.line] };
    });
    line.dataset.holds = String(each.holds);
    [each.label, each.text || "not yet", each.threshold, MARKS.get(each.holds)].forEach((text, at) => put(cells[at], text));
  }
  put(root.querySelector(".fine"), now.failures.length ? "" : "None since the start.");
  const failures = root.querySelector(".failures");
  for (const each of now.failures) {
    const { line } = row(failures, each.kind, () => {
      const made = part("li");
      return { line: made, added: [made] };
    });
    put(line, `${each.what}: ${each.count.toLocaleString("en-US")}, last at ${each.last.slice(0, 19).replace("T", " ")} UTC`);
  }
  root.removeAttribute("aria-busy");
};

const ask = async () => {
  if (!element.isConnected) return;
  if (document.visibilityState === "visible") {
    try {
      show(await server.status());
      root.classList.remove("lost");
    } catch {
      root.classList.add("lost");
      put(root.querySelector(".state b"), "No answer");
      put(root.querySelector(".state span"), "the figures below are the last ones");
    }
  }
  setTimeout(ask, EVERY);
};
ask();
