// The words of a story that has been read: what else could stand at one, and another story from there. It goes on from `book.js`.
// The story's text stays as it is, and selectable: a word is known by its place, and its mark lies behind the text.
const marks = document.createElement("div");
const choices = document.createElement("div");
const options = document.createElement("ul");
const dicing = document.createElement("button");
marks.className = "marks";
marks.ariaHidden = "true";
choices.className = "choices";
choices.id = "choices";
options.role = "listbox";
options.ariaLabel = "What else could stand here";
choices.hidden = true;
dicing.type = "button";
dicing.className = "dicing";
dicing.textContent = "One word at a time";
dicing.ariaPressed = "false";
book.append(marks, choices);
book.insertBefore(dicing, status);

const RESTING = 120; // milliseconds at a word before it is asked about: nobody wants those that are passed over
let chosen = -1; // the word looked at; as many as there are: the place behind the last
let found = []; // what could stand there
let option = -1; // the one of these that the keyboard is at
let dice = false; // whether the story goes on by one word only, and which, the user or the dice decide

const words = () => {
  let at = shown.prompt.length;
  const all = (shown.words ?? []).map(([text, tokens, bits]) => ({ text, tokens, bits, from: at, to: (at += text.length) }));
  if (BUSY.has(shown.phase) || all.map((word) => word.text).join("") !== shown.generated) return [];
  return reading() ? all.filter((word) => word.to - shown.prompt.length <= unread()) : all;
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
  const paper = book.getBoundingClientRect();
  const boxes = [...(range?.getClientRects() ?? [])].map((box) => {
    const mark = document.createElement("span");
    Object.assign(mark.style, {
      left: `${box.left - paper.left}px`, top: `${box.top - paper.top}px`, width: `${box.width}px`, height: `${box.height}px`,
    });
    return mark;
  });
  marks.replaceChildren(...boxes);
  // Behind the last word the list stands below the story.
  const box = range?.getBoundingClientRect() ?? article.getBoundingClientRect();
  const left = Math.max(0, Math.min(box.left - paper.left, paper.width - choices.offsetWidth));
  Object.assign(choices.style, { left: `${left}px`, top: `${box.bottom - paper.top + 4}px` });
};

const percent = (share) => (share < 0.001 ? "below 0.1 %" : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`);
const named = (text) => text.trim() || "The end.";

const plain = (text, does) => {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", does);
  return made;
};

const list = () => {
  options.replaceChildren(...found.map(({ text, probability }, number) => {
    const item = document.createElement("li");
    item.role = "option";
    item.id = `choice-${number}`;
    item.ariaSelected = String(number === option);
    item.style.setProperty("--share", String(probability));
    const [key, word, share] = ["kbd", "span", "span"].map((tag) => document.createElement(tag));
    key.textContent = String(number + 1);
    word.textContent = named(text);
    share.textContent = percent(probability);
    item.append(key, word, share);
    item.addEventListener("click", () => fork(number));
    return item;
  }));
  choices.replaceChildren(options, dice ? plain("Roll the dice", roll) : plain("Futures from here", spread));
  choices.hidden = found.length === 0;
  if (option >= 0) article.setAttribute("aria-activedescendant", `choice-${option}`);
  place();
  choices.scrollIntoView({ block: "nearest" });
};

// What the server says of the place before this word, or behind the last; null where it says nothing, or something else is
// looked at by now.
const inquire = async (number, wanted) => {
  const [view, tokens] = [shown, words().slice(0, number).flatMap((word) => word.tokens)];
  const question = { title: view.title, prompt: view.prompt, tokens, seed: Math.max(0, view.seed), fields: window.story.now("fields"), ...wanted };
  const answer = (await server.look_at(question).catch(() => null)) ?? { error: OFFLINE }; // Gradio gives nothing on errors
  if (chosen !== number || shown !== view) return null;
  if (!answer.error) return answer;
  put(status, answer.error);
  put(spoken, answer.error);
  return null;
};

const look = async (number) => {
  const all = words();
  close();
  if (number < 0 || number > all.length) return;
  chosen = number;
  window.story.keep("chosen", number);
  place();
  const view = shown;
  if (!dice) await new Promise((rested) => setTimeout(rested, RESTING));
  if (chosen !== number || shown !== view) return;
  const answer = await inquire(number, {});
  if (!answer) return;
  found = answer.alternatives;
  list();
  const said = found.map(({ text, probability }, at) => `${dice ? `${at + 1}: ` : ""}${named(text)} ${percent(probability)}`).join(", ");
  put(spoken, `${number < all.length ? named(all[number].text) : "The place behind the last word"}, ${number + 1} of ${all.length}. ${said}`);
};

const fork = (number) => {
  const { text, tokens, probability } = found[number];
  part(text ? [[text, tokens, -Math.log2(probability)]] : []);
};

// Another story after the words before the chosen one and these; without any, it ends there.
const part = (added) => {
  const [at, text] = [chosen, added[0]?.[0] ?? ""];
  const before = [...words().slice(0, at).map((word) => [word.text, word.tokens, word.bits]), ...added];
  const generated = before.map(([word]) => word).join("");
  if (!dice || !stepped || at < words().length) branchOff(at, added); // in `tree.js`
  close();
  const view = { ...shown, words: before, generated, figures: "", took: "", finish_reason: "" };
  read = Infinity;
  if (!text) {
    setDice(false);
    show({ ...view, phase: "ended", status: "The end", spoken: "The end." });
  } else if (dice) {
    stepped = true;
    show({ ...view, phase: "open", status: STEPS, spoken: named(text) });
    queueMicrotask(() => look(before.length)); // once the view has settled
  } else {
    shown = view;
    ask("fork");
  }
};

// One word at a time.
const STEPS = "One word at a time: 1 to 9 choose one, Enter rolls the dice, Backspace takes one back, Escape ends it.";
let stepped = false; // whether the branch that is shown is made of such steps

const setDice = (on) => {
  dice = on;
  if (!on) stepped = false;
  dicing.ariaPressed = String(on);
  article.classList.toggle("alive", on || words().length > 0);
};

const toggleDice = () => {
  if (BUSY.has(shown.phase)) return;
  const prompt = (document.querySelector("#prompt textarea")?.value ?? "").trimEnd();
  setDice(!dice);
  if (!dice) {
    close();
    if (shown.status === STEPS) show({ ...shown, status: "Stopped", spoken: "Stopped." });
    else put(status, shown.status);
    return;
  }
  read = Infinity;
  if (shown.phase === "empty" || (chosen < 0 && prompt && prompt !== shown.prompt)) {
    fresh = true;
    show({ ...empty, run, prompt, phase: "open", status: STEPS, spoken: STEPS, seed: 0 });
    stepped = true;
  } else put(status, STEPS);
  article.tabIndex = 0;
  article.focus({ preventScroll: true });
  const at = Math.max(0, chosen);
  queueMicrotask(() => look(at));
};

const roll = async () => {
  const answer = await inquire(chosen, { roll: true });
  if (answer) part(answer.word ? [answer.word] : []);
};

const stepBack = () => {
  const kept = shown.words.slice(0, -1);
  const generated = kept.map(([word]) => word).join("");
  close();
  show({ ...shown, words: kept, generated, spoken: kept.length ? named(kept.at(-1)[0]) : "The beginning." });
  queueMicrotask(() => look(kept.length));
};

dicing.addEventListener("click", toggleDice);
article.addEventListener("click", (event) => {
  if (!String(getSelection())) look(wordAt(event.clientX, event.clientY));
});
article.addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const [size, number] = [words().length, "123456789".indexOf(event.key)];
  if (event.ctrlKey || event.metaKey || event.altKey || !(size || dice)) return;
  if (move) look(Math.max(0, Math.min(size, chosen + move)));
  else if (step && found.length) {
    option = (option + step + found.length + (option < 0 && step < 0 ? 1 : 0)) % found.length;
    list();
  } else if (number >= 0 && event.key && found[number]) fork(number);
  else if (event.key === "Enter" && option >= 0) fork(option);
  else if (event.key === "Enter" && dice && found.length) roll();
  else if (event.key === "Backspace" && stepped && size > branches[branch].at) stepBack();
  else if (event.key === "Backspace" && branch) turn(branches[branch].parent);
  else if (event.key === "Escape" && dice) toggleDice();
  else if (event.key === "Escape" && chosen >= 0) close();
  else if (event.key === "f" && chosen >= 0) spread();
  else if (event.key === "d") toggleDice();
  else return;
  event.preventDefault();
});
document.addEventListener("pointerdown", (event) => {
  if (chosen >= 0 && !book.contains(event.target)) close();
});
new ResizeObserver(() => { if (chosen >= 0) place(); }).observe(article);
