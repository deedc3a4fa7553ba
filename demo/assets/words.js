// The words of a story that has ended: what else could stand at one, and another story from there. It goes on from `book.js`.
// The story's text stays as it is, and selectable: a word is known by its place, and its mark lies behind the text.
const marks = document.createElement("div");
const choices = document.createElement("ul");
const tree = document.createElement("nav");
const fan = document.createElement("section");
fan.className = "fan";
fan.ariaLabel = "Futures: how the story could go on";
fan.hidden = true;
marks.className = "marks";
marks.ariaHidden = "true";
choices.className = "choices";
choices.role = "listbox";
choices.id = "choices";
choices.ariaLabel = "What else could stand here";
choices.hidden = true;
tree.className = "branches";
tree.ariaLabel = "Branches of the story";
tree.hidden = true;
book.append(marks, choices);
book.insertBefore(tree, status);
book.insertBefore(fan, status);

const RESTING = 120; // milliseconds at a word before it is asked about: nobody wants those that are passed over
let chosen = -1; // the word looked at
let found = []; // what could stand there
let option = -1; // the one of these that the keyboard is at
let branches = window.story.kept?.branches?.all ?? []; // {parent, word, view}, by their number; the first is the story itself
let branch = window.story.kept?.branches?.now ?? 0;

const words = () => {
  let at = shown.prompt.length;
  const all = (shown.words ?? []).map(([text, tokens, bits]) => ({ text, tokens, bits, from: at, to: (at += text.length) }));
  return BUSY.has(shown.phase) || all.map((word) => word.text).join("") !== shown.generated ? [] : all;
};

// The text node at a place of the story, and the place in it.
const spot = (offset) => {
  const paragraph = [...article.children].findLast((each) => each.start <= offset);
  let left = offset - (paragraph?.start ?? 0);
  for (const span of paragraph?.children ?? []) {
    const size = span.textContent.length;
    if (span.firstChild && left <= size) return [span.firstChild, left];
    left -= size;
  }
  return null;
};

const rangeOf = ({ text, from, to }) => {
  const [first, last] = [spot(from + text.length - text.trimStart().length), spot(to)];
  if (!first || !last) return null;
  const range = document.createRange();
  range.setStart(...first);
  range.setEnd(...last);
  return range;
};

const wordAt = (x, y) => {
  const caret = document.caretPositionFromPoint?.(x, y);
  const old = caret ? null : document.caretRangeFromPoint?.(x, y);
  const node = caret?.offsetNode ?? old?.startContainer;
  const paragraph = node?.parentElement?.closest("p");
  if (!paragraph || paragraph.parentElement !== article) return -1;
  let at = paragraph.start + (caret?.offset ?? old.startOffset);
  for (const span of paragraph.children) {
    if (span === node.parentElement) break;
    at += span.textContent.length;
  }
  return words().findIndex(({ from, to }) => from <= at && at < to);
};

const close = () => {
  chosen = option = -1;
  found = [];
  marks.replaceChildren();
  choices.hidden = true;
  fan.hidden = true;
  article.removeAttribute("aria-activedescendant");
};

const place = () => {
  const word = words()[chosen];
  const range = word && rangeOf(word);
  if (!range) return close();
  const paper = book.getBoundingClientRect();
  const boxes = [...range.getClientRects()].map((box) => {
    const mark = document.createElement("span");
    Object.assign(mark.style, {
      left: `${box.left - paper.left}px`, top: `${box.top - paper.top}px`, width: `${box.width}px`, height: `${box.height}px`,
    });
    return mark;
  });
  marks.replaceChildren(...boxes);
  const box = range.getBoundingClientRect();
  const left = Math.max(0, Math.min(box.left - paper.left, paper.width - choices.offsetWidth));
  Object.assign(choices.style, { left: `${left}px`, top: `${box.bottom - paper.top + 4}px` });
};

const percent = (share) => (share < 0.001 ? "below 0.1 %" : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`);
const named = (text) => text.trim() || "The end.";

const list = () => {
  choices.replaceChildren(...found.map(({ text, probability }, number) => {
    const item = document.createElement("li");
    item.role = "option";
    item.id = `choice-${number}`;
    item.ariaSelected = String(number === option);
    item.style.setProperty("--share", String(probability));
    const [word, share] = [document.createElement("span"), document.createElement("span")];
    word.textContent = named(text);
    share.textContent = percent(probability);
    item.append(word, share);
    item.addEventListener("click", () => fork(number));
    return item;
  }));
  if (found.length) {
    const more = document.createElement("li");
    more.role = "presentation";
    const futures = document.createElement("button");
    futures.type = "button";
    futures.textContent = "Futures from here";
    futures.addEventListener("click", spread);
    more.append(futures);
    choices.append(more);
  }
  choices.hidden = found.length === 0;
  if (option >= 0) article.setAttribute("aria-activedescendant", `choice-${option}`);
  place();
  choices.scrollIntoView({ block: "nearest" });
};

const look = async (number) => {
  const all = words();
  close();
  if (number < 0 || number >= all.length) return;
  chosen = number;
  place();
  const asked = shown;
  await new Promise((rested) => setTimeout(rested, RESTING));
  if (chosen !== number || shown !== asked) return;
  const tokens = all.slice(0, number).flatMap((word) => word.tokens);
  const answer = (await server.look_at({ prompt: shown.prompt, tokens }).catch(() => null)) ?? { error: OFFLINE }; // Gradio gives nothing on errors
  if (chosen !== number || shown !== asked) return; // another word, or another story, by now
  if (answer.error) {
    put(status, answer.error);
    put(spoken, answer.error);
    return;
  }
  found = answer.alternatives;
  list();
  const said = found.map(({ text, probability }) => `${named(text)} ${percent(probability)}`).join(", ");
  put(spoken, `${named(all[number].text)}, word ${number + 1} of ${all.length}. ${said}`);
};

const fork = (number) => {
  const { text, tokens, probability } = found[number];
  part(text ? [[text, tokens, -Math.log2(probability)]] : []);
};

// Another story after the words before the chosen one and these; without any, it ends there.
const part = (added) => {
  const before = [...words().slice(0, chosen).map((word) => [word.text, word.tokens, word.bits]), ...added];
  const text = added[0]?.[0] ?? "";
  const generated = before.map(([word]) => word).join("");
  const lead = words().slice(0, chosen).map((word) => word.text).join("").trim().split(/\s+/).slice(-2).join(" ");
  branches.push({ parent: branch, word: text ? `… ${lead}${text}` : named(text), view: null });
  branch = branches.length - 1;
  close();
  const view = { ...shown, words: before, generated };
  if (text) {
    shown = view;
    ask("fork");
  } else show({ ...view, phase: "ended", status: "The end", spoken: "The end." });
};

// Sixteen futures of the story from the chosen word on, merged where they begin alike; a future's height is its share.
const spread = async () => {
  const [number, asked] = [chosen, shown];
  const tokens = words().slice(0, number).flatMap((word) => word.tokens);
  const answer = (await server.look_at({ prompt: shown.prompt, tokens, seed: Math.max(0, shown.seed), futures: true }).catch(() => null))
    ?? { error: OFFLINE };
  if (chosen !== number || shown !== asked) return;
  if (answer.error) {
    put(status, answer.error);
    put(spoken, answer.error);
    return;
  }
  choices.hidden = true;
  fan.replaceChildren(limbs(answer.futures, []));
  fan.hidden = false;
  fan.scrollIntoView({ block: "nearest" });
  fan.querySelector("button")?.focus({ preventScroll: true });
};

const limbs = (all, before) => {
  const list = document.createElement("ul");
  list.append(...all.map(({ words: added, count, branches: further }) => {
    const item = document.createElement("li");
    const row = document.createElement("button");
    row.type = "button";
    row.textContent = added.map(([word]) => word).join("").trim() || "¶";
    row.title = `${count} of 16`;
    row.addEventListener("click", () => part([...before, ...added]));
    item.style.flexGrow = String(count);
    item.append(row);
    if (further.length) item.append(limbs(further, [...before, ...added]));
    return item;
  }));
  return list;
};

const turn = (number) => {
  if (BUSY.has(shown.phase) || !branches[number]?.view) return;
  close();
  branch = number;
  show({ ...branches[number].view, run });
  article.focus({ preventScroll: true });
};

const grow = () => {
  const rows = [];
  const add = (number, depth) => {
    const row = document.createElement("button");
    row.type = "button";
    row.textContent = number ? branches[number].word : "The story";
    row.style.setProperty("--depth", String(depth));
    if (number === branch) row.ariaCurrent = "true";
    row.addEventListener("click", () => turn(number));
    rows.push(row);
    branches.forEach((each, index) => { if (index && each.parent === number) add(index, depth + 1); });
  };
  if (branches.length) add(0, 0);
  tree.replaceChildren(...rows);
  tree.hidden = branches.length < 2;
};

// After each view: words can be looked at when the story has ended.
let last = null;
const settled = () => {
  if (shown === last) return;
  last = shown;
  if (chosen >= 0) close();
  const alive = words().length > 0;
  article.tabIndex = alive ? 0 : -1;
  article.classList.toggle("alive", alive);
  if (fresh && !leaving) { // the new story has begun
    branches = [];
    branch = 0;
    fresh = false;
  }
  if (alive) {
    branches[branch] = { parent: 0, word: "", ...branches[branch], view: shown };
    window.story.keep("branches", { all: branches, now: branch });
  }
  grow();
};

article.addEventListener("click", (event) => {
  if (!String(getSelection())) look(wordAt(event.clientX, event.clientY));
});
article.addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || !words().length) return;
  if (move) look(Math.max(0, Math.min(words().length - 1, chosen + move)));
  else if (step && found.length) {
    option = (option + step + found.length + (option < 0 && step < 0 ? 1 : 0)) % found.length;
    list();
  } else if (event.key === "Enter" && option >= 0) fork(option);
  else if (event.key === "Backspace" && branch) turn(branches[branch].parent);
  else if (event.key === "Escape" && chosen >= 0) close();
  else if (event.key === "f" && chosen >= 0) spread();
  else return;
  event.preventDefault();
});
document.addEventListener("pointerdown", (event) => {
  if (chosen >= 0 && !book.contains(event.target)) close();
});
new ResizeObserver(() => { if (chosen >= 0) place(); }).observe(article);
