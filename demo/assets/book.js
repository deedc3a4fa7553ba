// Draws a story from the component's value, a view, and sends requests for others. A story is text: it only ever becomes text nodes, never HTML.
const book = element.querySelector(".book");
const article = element.querySelector("article");
const wishes = element.querySelector(".wishes");
const note = element.querySelector(".note");
const status = element.querySelector(".status");
const spoken = element.querySelector(".spoken");
let drawn = "";

// Text that grows is appended, so that what a user has selected of it stays selected.
const put = (node, text) => {
  const old = node.textContent;
  if (old === text) return;
  if (old && text.startsWith(old) && node.firstChild === node.lastChild) node.firstChild.appendData(text.slice(old.length));
  else node.textContent = text;
};

// A first letter is set large where its script has large initials and a word goes on after it; a quote before it hangs.
const INITIAL = /^(["“‘«„‚‹]?)[\p{Script=Latin}\p{Script=Greek}\p{Script=Cyrillic}]\p{M}*(?=[\p{L}\s]|$)/u;

// Paragraphs are parted by line breaks. The prompt and the generated text differ in shade.
const draw = (prompt, generated) => {
  const whole = prompt + generated;
  const key = prompt.length + " " + whole;
  if (key === drawn) return;
  drawn = key;
  let at = 0;
  let count = 0;
  for (const text of whole.split("\n")) {
    const split = Math.max(0, Math.min(text.length, prompt.length - at));
    const start = at;
    at += text.length + 1;
    if (!text.trim()) continue;
    let paragraph = article.children[count];
    if (!paragraph) {
      paragraph = document.createElement("p");
      paragraph.dir = "auto";
      paragraph.append(...["", "prompt", "generated"].map((kind) => {
        const span = document.createElement("span");
        span.className = kind;
        return span;
      }));
      article.append(paragraph);
    }
    paragraph.start = start;
    const initial = count === 0 ? INITIAL.exec(text) : null;
    const quote = initial ? initial[1].length : 0;
    const [hanging, given, made] = paragraph.children;
    paragraph.classList.toggle("initial", initial !== null);
    hanging.className = quote > split ? "hanging generated" : "hanging prompt";
    put(hanging, text.slice(0, quote));
    put(given, text.slice(quote, Math.max(quote, split)));
    put(made, text.slice(Math.max(quote, split)));
    count += 1;
  }
  while (article.children.length > count) article.lastChild.remove();
};

// A button of the page is a plain one: this script says at once which of them can be pressed, and answers them.
const BUSY = new Set(["waiting", "writing"]);
const PATIENCE = 5000; // milliseconds without a view, after which the connection counts as cut: one comes each half second
const FIRST_PATIENCE = 20000; // the same before the first view of a story: the server may be busy
const FASTEST = 40; // characters a second: nobody reads faster, so nothing faster is followed
const button = (id) => document.getElementById(id);
const empty = props.value;
let shown = empty; // the view on the page
let before = empty; // the view to go back to when a new story is refused
let run = 0; // number of the last request; views of earlier ones are left out
let stopping = false;
let stopped = 0; // number of the last request that was to stop: the server stops none that is newer
let heard = 0;
let began = 0;
let length = 0; // of the text that the last request went on from
let fresh = false; // whether the last request was for a new story, not for more of this one
let asked = ""; // what the last request was for
let leaving = false; // whether the last story is still there, for a new one has no word yet

const enable = () => {
  const { phase, prompt, generated, link, story, example } = shown;
  const busy = BUSY.has(phase);
  const running = (busy || reading()) && !stopping;
  const ended = (phase === "ended" || phase === "open") && !reading();
  const able = {
    stop: running,
    skip: running && read < Infinity && !leaving,
    write: !busy || example, // nobody has to wait for what he has not asked for
    continue: (phase === "open" || phase === "failed") && !reading() && prompt + generated !== "",
    again: !busy && phase !== "empty" && !example,
    save: prompt + generated !== "",
    "save-md": prompt + generated !== "",
    "save-json": prompt + generated !== "",
    "save-png": prompt + generated !== "",
    link: (link !== "" || !busy) && prompt + generated !== "",
    like: ended && generated !== "" && story !== "",
    dislike: ended && generated !== "" && story !== "",
  };
  const held = document.activeElement;
  for (const [id, can] of Object.entries(able)) if (button(id)) button(id).disabled = !can;
  // A disabled element loses the focus: hand it on to the next useful one.
  if (held?.id in able && !able[held.id]) button(running ? "stop" : "write")?.focus({ preventScroll: true });
  for (const [id, value] of [["like", 1], ["dislike", -1]]) {
    button(id)?.setAttribute("aria-pressed", String(shown.rating === value));
  }
};

// Say what is wrong beside the field as well, wherever that is; the first of them gets the focus.
const mark = (problems) => {
  document.querySelectorAll(".problem").forEach((node) => node.remove());
  document.querySelectorAll("[aria-invalid]").forEach((field) => {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  });
  Object.entries(problems).forEach(([label, problem], at) => {
    const id = label.toLowerCase().replaceAll(" ", "-");
    if (!button(id)?.checkVisibility()) window.story.unfold(id === "words" ? "wishes" : "more");
    window.story.whenThere(`#${id} :is(input, textarea)`, (first) => {
      const note = document.createElement("p");
      note.className = "problem";
      note.id = `${id}-problem`;
      note.textContent = `${problem}.`;
      button(id).append(note);
      button(id).querySelectorAll("input, textarea").forEach((field) => {
        field.setAttribute("aria-invalid", "true");
        field.setAttribute("aria-describedby", note.id);
      });
      const focus = () => (first.checkVisibility() ? first.focus() : requestAnimationFrame(focus)); // the fold opens
      if (at === 0) focus();
    });
  });
};

const show = (view) => {
  const found = JSON.stringify(view.problems) !== JSON.stringify(shown.problems);
  shown = view;
  props.value = { ...view, stopped };
  put(note, view.note);
  put(figures, view.figures);
  book.classList.toggle("leaving", leaving && BUSY.has(view.phase));
  render(); // in `pace.js`
  if (found) mark(view.problems);
  queueMicrotask(() => settled()); // in `tree.js`
  window.story.keep("view", view);
};

const broken = (message, problems = {}) => {
  const view = leaving ? before : { ...shown, phase: "failed" };
  show({ ...view, run, status: message, took: "", spoken: message, problems });
};

const OFFLINE = "There is no connection.";
const ask = (wanted) => {
  if (!navigator.onLine) {
    show({ ...shown, took: "", status: `${OFFLINE} Please try again when there is one.`, spoken: OFFLINE });
    return;
  }
  before = BUSY.has(shown.phase) ? { ...empty, ...(shown.generated && { ...shown, phase: "open", status: "Stopped" }) } : shown;
  run += 1;
  asked = wanted;
  stopping = false;
  began = performance.now();
  heard = began + FIRST_PATIENCE - PATIENCE;
  leaving = fresh = wanted !== "continue" && wanted !== "fork";
  length = leaving ? 0 : shown.generated.length;
  if (!leaving) pace(length);
  const example = shown.example && wanted === "open";
  show({ ...shown, run, wanted, example, phase: "waiting", status: "Beginning…", spoken: "Writing.", problems: {} });
  const box = book.getBoundingClientRect();
  if (leaving && !shown.example && (box.top > innerHeight * 0.6 || box.top < 0)) book.scrollIntoView({ block: "start" });
  setTimeout(() => trigger("submit"), 0); // a field that is being left hands over its value first
};

const halt = (number) => {
  stopped = Math.max(stopped, number);
  props.value = { ...shown, stopped };
  trigger("stop");
};

const stop = () => {
  stopping = true;
  if (BUSY.has(shown.phase)) halt(run);
  if (leaving) {
    run += 1;
    stopping = false; // what is left of the story before it can be
    broken("Stopped.");
  } else {
    limit = unread();
    read = Infinity;
    show(cut({ ...shown, phase: "open", status: "Stopped", spoken: "Stopped." }));
  }
};

const PRESSES = { // others are in `shelf.js`
  write: () => ask("write"),
  again: () => ask("again"),
  continue: () => ask("continue"),
  stop,
  skip,
  like: () => { props.value = { ...shown, wanted: "like" }; trigger("like"); },
  dislike: () => { props.value = { ...shown, wanted: "dislike" }; trigger("like"); },
};
document.addEventListener("click", (event) => PRESSES[event.target.closest?.("button")?.id]?.());

addEventListener("offline", () => {
  if (!BUSY.has(shown.phase)) return;
  run += 1; // what still comes of it would take the place of the message
  broken(`${OFFLINE} The text so far is kept.`);
});
setInterval(() => {
  if (BUSY.has(shown.phase) && performance.now() - heard > PATIENCE) {
    broken("The connection was interrupted. The text so far is kept: press Continue to go on, or Write to begin again.");
  }
}, 1000);

watch("value", () => {
  const view = props.value;
  if (view.run !== run) { // of a story that was given up
    props.value = { ...shown, stopped };
    if (BUSY.has(view.phase) && !BUSY.has(shown.phase)) halt(view.run);
    return;
  }
  const busy = BUSY.has(view.phase);
  heard = performance.now();
  if (stopping && busy) { // it was not yet there to be stopped
    halt(run);
    return;
  }
  const story = before.prompt + before.generated !== "";
  if (leaving && story && view.phase === "waiting") { // not before its first word does it take the last one's place
    props.value = { ...shown, stopped };
    return;
  }
  if (leaving && story && view.phase === "failed" && !view.generated) {
    broken(view.status, view.problems);
    return;
  }
  if (view.example && view.phase === "failed" && !view.generated) { // nobody asked for it
    show({ ...empty, run });
    return;
  }
  if (leaving && view.phase !== "waiting") {
    leaving = false;
    pace(0);
  }
  if (view.phase === "failed") read = Infinity;
  const slow = (view.generated.length - length) / (heard - began) < FASTEST / 1000;
  const atEnd = document.documentElement.scrollHeight - innerHeight - scrollY < 160;
  show(stopping ? cut(view) : view);
  if (view.wanted === "open" && view.phase === "empty") ask("open");
  if (busy && slow && atEnd && read === Infinity) scrollTo({ top: document.documentElement.scrollHeight });
});
