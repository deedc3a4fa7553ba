// The page Inside: a story word by word, and what each word depends on. It stands as the reading that the server gives;
// a story is text: it only ever becomes text nodes. A word is known by its number.
const root = element.querySelector(".inside");
const [note, tints, legend, article] = [".note", ".tints", ".legend", "article"].map((each) => root.querySelector(each));
const panel = (name) => root.querySelector(`.panels .${name}`);
const RESTING = 150; // milliseconds at a word before it is asked about
const HIGHEST = { surprise: 12, entropy: 8 }; // bits of the strongest tint
const OFFLINE = "There is no connection, or the page was restarted. Please try again.";

let words = []; // {text, tokens, bits, entropy, node}
let chosen = -1;
let tint = "surprise";
let layers = []; // what they read at the chosen word
let effects = []; // what each word before the chosen one did for it

const make = (name, kind, ...inside) => {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  node.append(...inside);
  return node;
};
const number = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
const percent = (share) => (share < 0.001 ? "below 0.1 %" : `${number(share * 100, share < 0.1 ? 1 : 0)} %`);
const named = (text) => {
  if (text === "") return "The end.";
  if (text.includes("\uFFFD")) return "part of a character";
  return text.trim() ? (/^\s/.test(text) ? text.trim() : text) : text.includes("\n") ? "¶" : "a space";
};
const quoted = (word) => `“${named(word.text)}”`;

// What sampling leaves of a distribution, as model/runtimes/sampling.py does it: temperature, then min-p, then top-p over what
// that left. Takes log-probabilities, the likeliest first; returns probabilities, 0 for what is cut.
const cut = (logprobs, { temperature, topP, minP }) => {
  if (temperature === 0) return logprobs.map((_, place) => (place ? 0 : 1));
  const weights = logprobs.map((logprob) => Math.exp((logprob - logprobs[0]) / temperature));
  const passing = weights.map((weight) => (weight >= minP ? weight : 0));
  const mass = passing.reduce((sum, weight) => sum + weight, 0);
  let before = 0;
  const kept = passing.map((weight) => {
    const inside = topP >= 1 || before < topP * mass;
    before += weight;
    return inside ? weight : 0;
  });
  const total = kept.reduce((sum, weight) => sum + weight, 0);
  return kept.map((weight) => weight / total);
};
window.inside = { cut };

const ask = async (question, more) =>
  (await server.look_inside({ question, ...more }).catch(() => null)) ?? { error: OFFLINE }; // Gradio gives nothing on errors

// Ask about the chosen word; null when another was chosen meanwhile.
const askHere = async (question, say, more = {}) => {
  const [word, story] = [chosen, words];
  const answer = await ask(question, { words: words.map(({ tokens }) => tokens), word, ...more });
  if (word !== chosen || story !== words) return null;
  if (!answer.error) return answer;
  say.textContent = answer.error;
  return null;
};

// ── The story and its tint ──

const draw = () => {
  let paragraph = make("p");
  article.replaceChildren(paragraph);
  for (const [at, word] of words.entries()) {
    const [gap] = /^\s*/.exec(word.text);
    if (gap.includes("\n") && paragraph.childNodes.length) {
      paragraph = make("p");
      article.append(paragraph);
    } else paragraph.append(gap);
    word.node = make("span", "word", word.text.slice(gap.length));
    word.node.dataset.number = at;
    paragraph.append(word.node);
  }
};

// `shares` is a number from -1 to 1 for each word, or null.
const paint = (shares) => {
  for (const [at, { node }] of words.entries()) {
    const share = shares[at] ?? 0;
    node.style.setProperty("--share", Math.min(1, Math.abs(share)).toFixed(3));
    node.classList.toggle("for", share > 0.02 && tint === "evidence");
    node.classList.toggle("against", share < -0.02);
  }
};

const PAINTERS = {
  surprise: () => {
    paint(words.map(({ bits }) => bits / HIGHEST.surprise));
    return [[`0 bits`], [`${HIGHEST.surprise} bits of surprise or more`]];
  },
  entropy: () => {
    paint(words.map(({ entropy }) => entropy / HIGHEST.entropy));
    return [["0 bits"], [`${HIGHEST.entropy} bits or more: how open it was what would come`]];
  },
  evidence: () => {
    const highest = Math.max(0.1, ...effects.map((effect) => Math.abs(effect ?? 0)));
    paint(effects.map((effect) => (effect === null ? null : effect / highest)));
    return [["spoke against it (dashed)", "against"], [`for it, ${number(highest, 1)} bits at most`, "for"]];
  },
  layers: () => {
    const { layer, head } = pressed();
    const { kind, heads } = layers[layer];
    const shares = heads[head].words;
    const highest = Math.max(1e-9, ...shares);
    paint(shares.map((share) => share / highest));
    const what = kind === "attention" ? "of its attention" : "of what its memory holds";
    return [["0"], [`${percent(highest)} ${what}: layer ${layers[layer].layer}, head ${head + 1}`]];
  },
};

const show = (name) => {
  tint = name;
  const ends = PAINTERS[name]();
  legend.className = `legend ${name}`;
  legend.replaceChildren(...ends.flatMap(([text, kind], at) => {
    const sample = make("span", `sample ${kind ?? ""}`, "a word");
    sample.style.setProperty("--share", kind ? "1" : String(at));
    return [sample, make("span", "", text)];
  }));
  tints.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.name === name)));
  root.querySelectorAll(".heads button").forEach((button) => {
    button.setAttribute("aria-pressed", String(name === "layers" && button === pressedHead));
  });
};
tints.append(...[["surprise", "Surprise"], ["entropy", "Entropy"]].map(([name, label]) => {
  const button = make("button", "", label);
  Object.assign(button, { type: "button", name });
  button.addEventListener("click", () => { if (words.length) show(name); });
  return button;
}));

// ── A word ──

const choose = async (at) => {
  if (at < 0 || at >= words.length) return;
  words[chosen]?.node.removeAttribute("aria-current");
  chosen = at;
  const word = words[at];
  word.node.setAttribute("aria-current", "true");
  const [name, facts] = panel("word").children;
  name.textContent = quoted(word);
  const place = `Word ${number(at + 1)} of ${number(words.length)}`;
  facts.textContent = `${place}: ${number(word.bits, 1)} bits of surprise, ${percent(2 ** -word.bits)} likely; `
    + `${number(word.entropy, 1)} bits were to be expected.`;
  root.querySelectorAll(".found").forEach((each) => { each.textContent = ""; });
  panel("layers").querySelector(".heads").replaceChildren();
  panel("evidence").querySelector("select").replaceChildren();
  panel("evidence").querySelector("label").hidden = true;
  panel("evidence").hidden = panel("layers").hidden = at === 0;
  [layers, effects] = [[], []];
  show(tint === "entropy" ? "entropy" : "surprise");
  await new Promise((rested) => setTimeout(rested, RESTING));
  if (chosen !== at || words[at] !== word) return;
  const [next, costs] = await Promise.all(["distribution", "memory"].map((question) => askHere(question, note)));
  if (next) spread(next);
  if (costs) recall(costs.rows);
  if (chosen === at) root.classList.add("ready"); // all together, so that nothing moves
};

article.addEventListener("click", (event) => {
  const node = event.target.closest(".word");
  if (node && !String(getSelection())) choose(Number(node.dataset.number));
});
article.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !words.length) return;
  const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: words.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(words.length - 1, to)));
  words[chosen].node.scrollIntoView({ block: "nearest" });
});

// ── What could stand here ──

const bars = (list, count) => {
  while (list.children.length > count) list.lastChild.remove();
  while (list.children.length < count) list.append(make("li", "", make("span", "name"), make("span", "share")));
  return [...list.children];
};
const bar = (item, name, share, text, before = 0) => {
  item.firstChild.textContent = name;
  item.lastChild.textContent = text;
  item.style.setProperty("--share", share.toFixed(4));
  item.style.setProperty("--before", before.toFixed(4));
};

let likeliest = null;
const spread = (found) => {
  likeliest = found;
  panel("cut").hidden = false;
  trim();
};
const settings = () => Object.fromEntries(
  [...panel("cut").querySelectorAll("input")].map((input) => [input.name, Number(input.value)]));
const trim = () => {
  for (const input of panel("cut").querySelectorAll("input")) {
    input.parentElement.querySelector("output").textContent = number(Number(input.value), 2);
  }
  if (!likeliest) return;
  const { tokens, tail, complete } = likeliest;
  const logprobs = [...tokens.map(([, , logprob]) => logprob), ...tail];
  const left = cut(logprobs, settings());
  const items = bars(panel("cut").querySelector(".bars"), tokens.length + 1);
  for (const [at, [, text, logprob]] of tokens.entries()) {
    const before = Math.exp(logprob);
    bar(items[at], named(text), left[at], `${percent(before)} → ${left[at] ? percent(left[at]) : "cut"}`, before);
    items[at].classList.toggle("gone", !left[at]);
  }
  const rest = items[tokens.length];
  const [before, after] = [tail.map(Math.exp), left.slice(tokens.length)].map((all) => all.reduce((sum, each) => sum + each, 0));
  bar(rest, "all others", after, `${percent(before)} → ${after ? percent(after) : "cut"}`, before);
  rest.classList.toggle("gone", !after);
  const kept = left.filter(Boolean).length;
  const share = left.reduce((sum, each, at) => sum + (each ? Math.exp(logprobs[at]) : 0), 0);
  panel("cut").querySelector(".kept").textContent = complete
    ? `${number(kept)} of ${number(left.length)} tokens are left; they held ${percent(share)}.`
    : `The service gives the ${tokens.length} likeliest only: all others count as one, which is exact at temperature 1 alone.`;
};
panel("cut").addEventListener("input", trim);

// ── Cut the memory ──

let rows = [];
const recall = (found) => {
  rows = found;
  const slider = panel("memory").querySelector("input");
  slider.max = String(rows.length - 1);
  slider.value = slider.max;
  panel("memory").hidden = false;
  remember();
};
const seen = (reach, at) => {
  const tokens = `${number(reach)} token${reach === 1 ? "" : "s"}`;
  return at === rows.length - 1 ? `all ${tokens}` : `the last ${tokens}`;
};
const remember = () => {
  const slider = panel("memory").querySelector("input");
  const at = Number(slider.value);
  const { reach, bits, likeliest: next } = rows[at];
  const line = `${seen(reach, at)}: ${quoted(words[chosen])} costs ${number(bits, 1)} bits`;
  slider.setAttribute("aria-valuetext", line);
  panel("memory").querySelector("output").textContent = line;
  const highest = Math.max(1, ...rows.map((row) => row.bits));
  const costs = bars(panel("memory").querySelector(".costs"), rows.length);
  for (const [place, row] of rows.entries()) {
    bar(costs[place], seen(row.reach, place), row.bits / highest, `${number(row.bits, 1)} bits`);
    costs[place].classList.toggle("now", place === at);
  }
  const items = bars(panel("memory").querySelector(".bars"), next.length);
  for (const [place, [text, share]] of next.entries()) bar(items[place], named(text), share, percent(share));
};
panel("memory").addEventListener("input", remember);

// ── Why this word, not another ──

const weigh = async () => {
  const [select, button, say] = ["select", "button", ".found"].map((each) => panel("evidence").querySelector(each));
  button.disabled = true;
  say.textContent = "Leaving out one word after another …";
  const other = select.value ? JSON.parse(select.value) : [];
  const found = await askHere("evidence", say, { other });
  button.disabled = false;
  if (!found) return;
  const key = JSON.stringify(found.other);
  select.replaceChildren(...found.others.map(({ text, tokens }) => {
    const option = make("option", "", named(text));
    option.value = JSON.stringify(tokens);
    return option;
  }));
  select.value = key;
  select.parentElement.hidden = false;
  effects = found.effects;
  const times = 2 ** Math.abs(found.odds);
  const [more, less] = found.odds >= 0 ? [quoted(words[chosen]), select] : [select, quoted(words[chosen])];
  const text = (each) => (each === select ? `“${select.selectedOptions[0]?.textContent}”` : each);
  const order = effects.map((effect, at) => [effect ?? 0, at]).sort(([a], [b]) => b - a);
  const listed = (pairs) => pairs.map(([effect, at]) => `${quoted(words[at])} ${number(effect, 1)}`).join(", ") || "none";
  say.textContent = `${text(more)} is ${number(times, times < 10 ? 1 : 0)} times as likely as ${text(less)}. `
    + `In bits, for ${quoted(words[chosen])}: ${listed(order.filter(([effect]) => effect > 0.05).slice(0, 3))}; `
    + `against it: ${listed(order.filter(([effect]) => effect < -0.05).slice(-3).reverse())}.`;
  show("evidence");
};
panel("evidence").querySelector("button").addEventListener("click", weigh);
panel("evidence").querySelector("select").addEventListener("change", weigh);

// ── What the layers read ──

let pressedHead = null;
const pressed = () => ({ layer: Number(pressedHead.dataset.layer), head: Number(pressedHead.dataset.head) });
const open = async () => {
  const [button, say, heads] = ["button", ".found", ".heads"].map((each) => panel("layers").querySelector(each));
  button.disabled = true;
  say.textContent = "Reading the layers; the first time takes some seconds …";
  const found = await askHere("layers", say);
  button.disabled = false;
  if (!found) return;
  layers = found.layers;
  say.textContent = "Press a head to see what it reads. A half-life is that of a recurrence's memory.";
  heads.replaceChildren(...layers.map(({ layer, kind, heads: all }, row) => {
    const group = make("div", "", make("span", "", `Layer ${layer}, ${kind}`));
    group.role = "group";
    group.ariaLabel = `Layer ${layer}, ${kind}`;
    group.append(...all.map(({ half_life: life }, head) => {
      const tokens = life === undefined ? "" : `: half-life ${number(life, life < 10 ? 1 : 0)} tokens`;
      const one = make("button", "", `Head ${head + 1}${tokens}`);
      one.type = "button";
      Object.assign(one.dataset, { layer: row, head });
      one.addEventListener("click", () => { pressedHead = one; show("layers"); });
      return one;
    }));
    return group;
  }));
  pressedHead = heads.querySelector("button");
  show("layers");
};
panel("layers").querySelector("button").addEventListener("click", open);

// ── Which story ──

const read = async (given, at = -1) => {
  note.textContent = "Reading a story …";
  const found = await ask("surprise", given);
  if (found.error) {
    note.textContent = found.error;
    root.classList.add("ready");
    return;
  }
  chosen = -1;
  likeliest = null;
  words = found.words.map(([text, tokens, bits, entropy]) => ({ text, tokens, bits, entropy }));
  const bits = words.reduce((sum, word) => sum + word.bits, 0);
  const what = found.example ? "An example, written just now" : "The story";
  note.textContent = `${what}: ${number(words.length)} words, ${number(bits / words.length, 1)} bits a word. Choose a word.`;
  draw();
  show("surprise");
  let place = 0; // in characters
  const starts = words.map(({ text }) => (place += text.length) - text.length);
  const named = starts.findLastIndex((start) => start <= at);
  const later = words.map((word, index) => (index > words.length / 4 && /\p{L}/u.test(word.text) ? word.bits : 0));
  choose(at >= 0 && named >= 0 ? named : Math.max(0, later.indexOf(Math.max(...later))));
};

root.querySelector(".read").addEventListener("click", () => {
  const text = root.querySelector("textarea").value.trim();
  if (text) read({ prompt: text });
});
// The story that was written last, with the word that was chosen there; an example where there is none.
const last = window.story.last();
const view = last?.view ?? {};
const texts = (view.words ?? []).map(([text]) => text);
if (view.prompt + view.generated && texts.join("") === view.generated && texts.length) {
  const word = view.chosen ?? last.chosen ?? -1;
  const at = word < 0 ? -1 : view.prompt.length + texts.slice(0, word).join("").length;
  read({ prompt: view.prompt, tokens: view.words.flatMap(([, tokens]) => tokens) }, at);
} else read({ prompt: view.generated ? view.prompt + view.generated : "" });
