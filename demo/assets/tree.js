// The tree of a story: its branches, each named by the word at which it parts; one may be starred, compared with the one that is
// shown, or pruned. It goes on from `words.js`.
const tree = document.createElement("nav");
const undo = document.createElement("p");
const comparison = document.createElement("section");
tree.className = "branches";
tree.ariaLabel = "Branches of the story";
undo.className = "undo";
comparison.className = "comparison";
comparison.ariaLabel = "Two branches compared";
tree.hidden = undo.hidden = comparison.hidden = true;
for (const part of [tree, undo, comparison]) book.insertBefore(part, status);

const OWN = ["phase", "status", "figures", "took", "note", "example", "link", "filename", "finish_reason", "story", "rating", "seed", "wishes", "title"];
let id = crypto.getRandomValues(new Uint32Array(2)).join("-"); // of this story on the shelf; empty: it is not to stand there
let branches = []; // by their number, see `branchOff`; the first is the story itself
let branch = 0; // the one that is shown
let takeBack = null; // what the last deed that destroys something can be undone by

// A branch has its parent's words up to `at`, and then its own, of which the first `hand` were chosen. `whole`: the rest was
// written in one request, which writes the same again.
const branchOff = (at, added) => {
  branches.push({ parent: branch, at, hand: added.length, word: nameAt(words().slice(0, at), added[0]), star: false, gone: false, whole: false, view: null });
  branch = branches.length - 1;
};

// A branch is named by the word that differs, after the two before it.
const nameAt = (before, first) => {
  const lead = before.map((word) => word.text ?? word[0]).join("").trim().split(/\s+/).slice(-2).join(" ");
  return first ? `… ${lead}${first[0]}` : "The end.";
};

// Only a branch's own words are kept, and what of its text is not in words.
const pack = () => branches.map(({ view, ...branch }) => {
  const there = view && !branch.gone;
  const size = there ? view.words.reduce((sum, [word]) => sum + word.length, 0) : 0;
  return {
    ...branch,
    own: there ? view.words.slice(branch.at) : [],
    rest: there ? view.generated.slice(size) : "",
    view: there ? Object.fromEntries(OWN.map((name) => [name, view[name]])) : null,
  };
});

const unpack = (packed, prompt) => {
  const all = [];
  for (const { own, rest, view, ...branch } of packed) {
    const words = [...(all[branch.parent]?.view?.words.slice(0, branch.at) ?? []), ...own];
    const generated = words.map(([word]) => word).join("") + rest;
    all.push({ ...branch, view: view && { ...empty, ...view, prompt, words, generated } });
  }
  return all;
};

const store = () => {
  const kept = { id, prompt: branches[0].view.prompt, all: pack(), now: branch };
  window.story.apart("branches", kept);
  shelve(kept); // in `shelf.js`
};

const turn = (number) => {
  if (BUSY.has(shown.phase) || !branches[number]?.view || branches[number].gone) return;
  setDice(false);
  close();
  comparison.hidden = true;
  branch = number;
  read = Infinity;
  show({ ...branches[number].view, run });
  article.focus({ preventScroll: true });
};

// Say what was done, with a way back until something else is done.
const undoable = (message, back) => {
  takeBack = back;
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "Undo";
  again.addEventListener("click", takenBack);
  undo.replaceChildren(`${message} `, again);
  undo.hidden = false;
  put(spoken, `${message} Control Z takes it back.`);
  again.focus({ preventScroll: true });
};

const takenBack = () => {
  const back = takeBack;
  takeBack = null;
  undo.hidden = true;
  back?.();
  article.focus({ preventScroll: true });
};

const below = (number) => branches.flatMap((each, index) => (index && index !== number && each.parent === number ? [index, ...below(index)] : []));

const prune = (number) => {
  const lost = [number, ...below(number)].filter((each) => !branches[each].gone);
  const was = branch;
  lost.forEach((each) => { branches[each].gone = true; });
  if (lost.includes(branch)) turn(branches[number].parent);
  grow();
  store();
  undoable(`“${branches[number].word}” was pruned.`, () => {
    lost.forEach((each) => { branches[each].gone = false; });
    turn(was);
    grow();
    store();
  });
};

const star = (number) => {
  branches[number].star = !branches[number].star;
  grow();
  store();
};

// The shown branch and another one beside each other; only what differs is marked.
const compare = (number) => {
  const [mine, other] = [branch, number].map((each) => branches[each].view.words.map(([word]) => word));
  const parts = difference(mine, other);
  const columns = [["first", branch], ["second", number]].map(([side, each]) => {
    const [column, heading, text] = ["div", "h2", "p"].map((tag) => document.createElement(tag));
    heading.textContent = nameOf(each);
    text.dir = "auto";
    text.append(shown.prompt, ...parts.map((part) => {
      const node = document.createElement(part.same ? "span" : "mark");
      node.textContent = part[side];
      return node;
    }));
    column.append(heading, text);
    return column;
  });
  const shut = document.createElement("button");
  shut.type = "button";
  shut.textContent = "Close";
  shut.addEventListener("click", () => { comparison.hidden = true; article.focus({ preventScroll: true }); });
  comparison.replaceChildren(...columns, shut);
  comparison.hidden = false;
  comparison.scrollIntoView({ block: "nearest" });
  shut.focus({ preventScroll: true });
};

const nameOf = (number) => (number ? branches[number].word : "The story");

// After each view: words can be looked at when the story has ended, and the branch is kept.
let last = null;
let wasBusy = false;
const settled = () => {
  if (shown === last) return;
  last = shown;
  if (chosen >= 0) close();
  const busy = BUSY.has(shown.phase);
  if (dice && busy) setDice(false);
  if (fresh && !leaving) { // the new story has begun
    id = crypto.getRandomValues(new Uint32Array(2)).join("-");
    branches = [];
    branch = 0;
    fresh = false;
    undo.hidden = comparison.hidden = true;
    window.story.keep("chosen", -1);
    window.story.apart("branches", null);
    takeBack = null;
  }
  const alive = dice || words().length > 0;
  article.tabIndex = alive ? 0 : -1;
  article.classList.toggle("alive", alive);
  const lost = shown.phase === "failed" && branch && !branches[branch]?.view && !shown.generated.slice(length);
  if (lost) { // nothing came of it
    const { parent } = branches.pop();
    branch = parent;
    const { status: message, problems } = shown;
    show({ ...branches[parent].view, run, status: message, took: "", spoken: message, problems });
  } else if (!busy && (alive || shown.generated)) {
    const known = branches[branch] ?? { parent: -1, at: 0, hand: 0, word: "", star: false, gone: false };
    const inOne = asked !== "continue" && !stopping && ["stop", "length"].includes(shown.finish_reason);
    const again = wasBusy && !leaving ? inOne : Boolean(known.whole) && known.view?.generated === shown.generated;
    branches[branch] = { ...known, whole: again, view: shown };
    store();
  }
  wasBusy = busy;
  grow();
};

// The map: a row for each branch, below its parent.
let mapped = "";
const grow = () => {
  const map = JSON.stringify([branch, branches.map(({ parent, word, star, gone }) => [parent, word, star, gone])]);
  if (map === mapped) return;
  mapped = map;
  const held = document.activeElement?.closest?.(".branches button")?.dataset.key;
  const list = document.createElement("ul");
  const add = (number, depth) => {
    const [row, name] = [document.createElement("li"), nameOf(number)];
    const action = (kind, label, text, then) => {
      const made = document.createElement("button");
      made.type = "button";
      made.className = kind;
      made.dataset.key = `${kind} ${number}`;
      made.textContent = text;
      if (label) made.ariaLabel = label;
      made.addEventListener("click", () => then(number));
      row.append(made);
      return made;
    };
    row.style.setProperty("--depth", String(Math.min(depth, 8)));
    const turns = action("name", "", name, turn);
    if (number === branch) turns.ariaCurrent = "true";
    const favourite = Boolean(branches[number].star);
    action("star", `Favourite: ${name}`, favourite ? "★" : "☆", star).ariaPressed = String(favourite);
    if (number !== branch) action("compare", `Compare with ${name}`, "Compare", compare);
    if (number) action("prune", `Prune ${name}`, "Prune", prune);
    list.append(row);
    branches.forEach((each, index) => { if (index && each.parent === number && !each.gone) add(index, depth + 1); });
  };
  if (branches.length) add(0, 0);
  tree.replaceChildren(list);
  tree.hidden = branches.filter((each) => !each.gone).length < 2;
  if (held) tree.querySelector(`[data-key="${held}"]`)?.focus({ preventScroll: true });
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input, textarea");
  if (takeBack && !typing && event.key === "z" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    takenBack();
  }
});
