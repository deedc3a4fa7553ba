// Reading pace: a story is there at once, and is shown as fast as somebody reads. It comes before `book.js`, which has the rest.
const RATE = 5.5; // words a second
const STEP = 60; // milliseconds
const LONGEST_STEP = 500; // a tab in the background, whose timers are slowed down, does not run ahead
const WORD = /\s*\S{1,24}/y;
const SENTENCE = /[^.!?…]*[.!?…]+["'”’»)]*/y;
const figures = element.querySelector(".figures p");
const paced = element.querySelector(".figures input");
const still = matchMedia("(prefers-reduced-motion: reduce)");
let read = Infinity; // characters of the generated text that have been read; all of them, where nothing is paced
let due = 0; // words, or a part of one, that time has brought since the last
let said = 0; // characters of it that a screen reader has heard
let then = 0;
let limit = Infinity; // characters of it that stood there when it was stopped
let timer = 0;
let wished = []; // the wishes that are shown, and which of them are ticked

const reading = () => read < shown.generated.length;

// The end of the word or sentence after this place; the place itself while that is still being written.
const endOf = (pattern, from) => {
  pattern.lastIndex = from;
  const end = pattern.test(shown.generated) ? pattern.lastIndex : shown.generated.length;
  return end === shown.generated.length && BUSY.has(shown.phase) ? from : end;
};

// Up to where the text is shown: to the word that is being read, or where motion is to be reduced, to the end of its sentence.
const unread = () => {
  if (!still.matches || !reading()) return read;
  let end = Math.min(read, length);
  while (end < read) {
    const next = endOf(SENTENCE, end);
    if (next === end) return read;
    end = next;
  }
  return end;
};

// A wish comes true for the user where its word stands; length and ending do at the end.
const isMet = (wish, text) => !reading() || text.includes(wish.toLowerCase()) || (wish === "dialogue" && /["“]/.test(text));

// Show of the view what has been read.
const render = () => {
  const text = shown.generated.slice(0, unread());
  draw(shown.prompt, text);
  const ticked = Object.entries(shown.wishes).map(([wish, met]) => [wish, met && isMet(wish, (shown.prompt + text).toLowerCase())]);
  if (JSON.stringify(ticked) !== JSON.stringify(wished)) {
    wished = ticked;
    wishes.replaceChildren(...ticked.map(([wish, met]) => {
      const item = document.createElement("li");
      item.textContent = wish;
      item.classList.toggle("met", met);
      return item;
    }));
  }
  const running = BUSY.has(shown.phase) || reading();
  const line = running || read < Infinity || !shown.took ? shown.status : `${shown.status} · ${shown.took}`;
  put(status, reading() && !BUSY.has(shown.phase) ? "Shown as fast as you read. Skip shows the rest." : line);
  if (!running) {
    put(spoken, `${shown.generated.slice(said)} ${shown.spoken}`.trim());
    said = Infinity;
  } else if (read === Infinity || leaving || read <= length) put(spoken, shown.spoken);
  book.dataset.phase = reading() ? "writing" : shown.phase;
  book.setAttribute("aria-busy", String(running));
  enable();
};

const step = () => {
  const now = performance.now();
  due += (Math.min(now - then, LONGEST_STEP) / 1000) * RATE;
  then = now;
  const atEnd = document.documentElement.scrollHeight - innerHeight - scrollY < 160;
  const before = read;
  while (due >= 1 && reading()) {
    const next = endOf(WORD, read);
    if (next === read) break;
    read = next;
    due -= 1;
  }
  due = Math.min(due, 1);
  if (read === before) {
    if (!reading() && !BUSY.has(shown.phase)) clearInterval(timer);
    return;
  }
  render();
  const end = endOf(SENTENCE, said);
  if (end > said && end <= unread() && reading()) {
    put(spoken, shown.generated.slice(said, end).trim());
    said = end;
  }
  if (atEnd && !shown.example) scrollTo({ top: document.documentElement.scrollHeight });
};

// From this place of the generated text on.
const pace = (from) => {
  clearInterval(timer);
  limit = Infinity;
  said = paced.checked ? from : Infinity;
  read = paced.checked ? from : Infinity;
  due = 1;
  then = performance.now();
  if (paced.checked) timer = setInterval(step, STEP);
};

// Show the rest, and say how fast it was written.
const skip = () => {
  clearInterval(timer);
  read = said = Infinity;
  render();
};

// A view without what had not been read when it was stopped.
const cut = (view) => {
  if (view.generated.length <= limit) return view;
  let size = 0;
  const kept = view.words.filter(([word]) => (size += word.length) <= limit);
  return { ...view, generated: view.generated.slice(0, limit), words: kept, phase: "open", status: "Stopped", spoken: "Stopped.", took: "" };
};

paced.checked = window.story.setting("pace") !== "off";
paced.addEventListener("change", () => {
  window.story.setting("pace", paced.checked ? "on" : "off");
  if (!paced.checked) skip();
});
