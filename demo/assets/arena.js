// Draws two stories at one pace, opens the vote when both have been read, and then shows who wrote them. Stories and names are text: they only ever become text nodes, never HTML.
const root = element.querySelector(".arena");
const sections = [...root.querySelectorAll(".pair section")];
const articles = sections.map((section) => section.querySelector("article"));
const ends = sections.map((section) => section.querySelector(".end"));
const status = root.querySelector(".status");
const spoken = root.querySelector(".spoken");
const ballot = [...root.querySelectorAll(".choices button")];
const skip = root.querySelector(".skip");
const result = root.querySelector(".result");

const PACE = 8; // words a second, of each story: about as fast as one of them can be read
const PATIENCE = 5000; // milliseconds without a view, after which the connection counts as cut
const FIRST_PATIENCE = 20000; // the same before the first view, and for the answer to a vote: the server may be busy
const BUSY = new Set(["waiting", "writing"]);
const CHOICES = { first: "A is better", second: "B is better", alike: "alike", "both bad": "both bad" };
let shown = props.value;
let run = 0; // number of the last battle; views of earlier ones are left out
let heard = 0;
let began = 0; // when the first word was shown
let drawn = [0, 0]; // characters of each story that stand on the page
let read = [null, null]; // seconds after which the end of each story had been seen
let voting = false; // a vote is on its way
let hurried = false; // both are to be shown at once
let told = "";

const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const tell = (text) => { if (told !== text) put(spoken, told = text); };
const calm = matchMedia("(prefers-reduced-motion: reduce)");

// Text is added to the last text node and never replaced, so that what is selected stays selected.
const add = (article, text, kind) => {
  text.split("\n").forEach((line, at) => {
    let paragraph = article.lastElementChild;
    if (!paragraph || (at > 0 && paragraph.textContent.trim())) {
      paragraph = document.createElement("p");
      paragraph.dir = "auto";
      article.append(paragraph);
    }
    let span = paragraph.lastElementChild;
    if (!line) return;
    if (!span || span.className !== kind) {
      span = document.createElement("span");
      span.className = kind;
      span.append(document.createTextNode(""));
      paragraph.append(span);
    }
    span.firstChild.appendData(line);
  });
};

// Where the word of this number ends, in each text; a last word may still grow.
const placeOf = (text, count, whole) => {
  const words = [...text.matchAll(/\s*\S+/g)];
  if (count >= words.length) return whole ? text.length : words.length ? words.at(-1).index : 0;
  return words[count]?.index ?? 0;
};

const texts = () => [shown.first, shown.second];
const complete = () => shown.phase === "reading" && texts().every((text, at) => drawn[at] === text.length);

const draw = () => {
  if (shown.phase !== "writing" && shown.phase !== "reading") return;
  const whole = shown.phase === "reading";
  if (!began && texts().some((text) => text)) began = performance.now();
  const words = !began ? 0 : (performance.now() - began) / 1000 * PACE + 1;
  // While a story is being written, neither goes on beyond what is there of both.
  const there = Math.min(...texts().map((text) => text.split(/\s+/).length));
  const count = skipped() ? Infinity : whole ? Math.floor(words) : Math.min(Math.floor(words), there);
  texts().forEach((text, at) => {
    const place = placeOf(text, count, whole);
    if (place > drawn[at]) {
      add(articles[at], text.slice(drawn[at], place), "generated");
      drawn[at] = place;
    }
    sections[at].classList.toggle("complete", whole && drawn[at] === text.length);
  });
};

const skipped = () => hurried || calm.matches;

const now = () => (performance.now() - began) / 1000;
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.inSight = entry.isIntersecting;
});
ends.forEach((end) => seen.observe(end));

const open = () => complete() && !voting && read.every((seconds) => seconds !== null) && now() >= shown.needed;

// What is missing before the vote opens.
const missing = () => {
  if (!complete()) return "The vote opens when you have read both.";
  const unseen = read.map((seconds, at) => (seconds === null ? "AB"[at] : "")).join("");
  if (unseen) return `Scroll to the end of ${unseen.split("").join(" and ")}: then the vote opens.`;
  return `The vote opens in ${Math.max(1, Math.ceil(shown.needed - now()))} s.`;
};

const step = () => {
  draw();
  if (complete()) {
    ends.forEach((end, at) => { if (read[at] === null && end.inSight) read[at] = now(); });
  }
  const ready = open();
  for (const button of ballot) button.disabled = !ready;
  skip.hidden = hurried || complete() || !BUSY.has(shown.phase) && shown.phase !== "reading";
  if (shown.phase === "reading" && !voting) {
    put(status, ready ? "Which story is better? Press a button, or a key from 1 to 4." : missing());
    tell(ready ? "The vote is open: which story is better?" : complete() ? "Both stories are there." : "Writing.");
  } else if (shown.phase === "writing") put(status, missing());
  const write = document.getElementById("write");
  if (!write) return;
  write.disabled = false; // once this script answers it; while both write it keeps the focus, and does nothing
  write.setAttribute("aria-disabled", String(BUSY.has(shown.phase)));
};

const cell = (text, name = "td") => {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
};
const percent = (value) => `${(100 * value).toFixed(0)} %`;

const showResult = ({ names, choice, counted, why, scores }) => {
  names.forEach((name, at) => put(sections[at].querySelector(".who"), name));
  const same = names[0] === names[1] ? " Both were the same: such battles show whether a side is preferred." : "";
  const kept = counted ? "" : ` It is kept, and not counted: ${why}.`;
  const said = `You said: ${CHOICES[choice]}.${same}${kept}`;
  put(result.querySelector(".said"), said);
  tell(`A was ${names[0]}, B was ${names[1]}. ${said}`);
  result.querySelector("tbody").replaceChildren(...scores.contestants.map((row) => {
    const line = document.createElement("tr");
    line.classList.toggle("early", !row.meaningful);
    const head = cell(row.name, "th");
    head.scope = "row";
    line.append(
      head,
      cell(percent(row.win_rate)),
      cell(`${percent(row.low)} to ${percent(row.high)}`),
      cell(percent(row.equal_length)),
      cell(row.meaningful ? String(row.battles) : `${row.battles}, too few yet`),
      cell(row.words.toFixed(0)),
    );
    return line;
  }));
  result.querySelector(".scroll").hidden = scores.contestants.length === 0;
  result.querySelector(".notes").replaceChildren(...scores.notes.map((note) => cell(note, "li")));
  result.hidden = false;
  put(status, "Press Write both for another battle.");
  result.focus({ preventScroll: true });
  result.scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
};

const show = (view) => {
  shown = view;
  props.value = view;
  root.dataset.phase = view.phase;
  root.setAttribute("aria-busy", String(BUSY.has(view.phase)));
  if (view.status) put(status, view.status);
  if (view.phase === "failed") tell(view.status);
  if (view.phase === "voted") showResult(view.result);
  step();
};

const broken = (message) => {
  run += 1; // what still comes would take the place of the message
  show({ ...shown, run, phase: "failed", status: message });
};

const ask = () => {
  if (BUSY.has(shown.phase)) return;
  run += 1;
  heard = performance.now() + FIRST_PATIENCE - PATIENCE;
  began = 0;
  [drawn, read, voting, hurried] = [[0, 0], [null, null], false, false];
  articles.forEach((article) => article.replaceChildren());
  sections.forEach((section) => {
    section.classList.remove("complete");
    put(section.querySelector(".who"), "");
  });
  result.hidden = true;
  tell("Writing.");
  show({ ...props.value, run, phase: "waiting", battle: "", first: "", second: "", result: null, status: "Both are writing …" });
  setTimeout(() => trigger("submit"), 0); // a field that is being left hands over its value first
};

const vote = (choice) => {
  if (!open()) return;
  voting = true;
  heard = performance.now() + FIRST_PATIENCE - PATIENCE;
  step();
  props.value = { ...shown, choice, first_read: read[0], second_read: read[1] };
  trigger("like");
};

ballot.forEach((button) => button.addEventListener("click", () => vote(button.dataset.choice)));
skip.addEventListener("click", () => {
  hurried = true;
  step();
  root.querySelector(".pair").scrollIntoView({ block: "nearest" });
});
document.addEventListener("click", (event) => {
  if (event.target.closest?.("button")?.id === "write") ask();
});
document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, select")) return;
  const button = ballot[Number(event.key) - 1];
  if (button && !button.disabled) {
    event.preventDefault();
    vote(button.dataset.choice);
  }
});
addEventListener("offline", () => { if (BUSY.has(shown.phase)) broken("There is no connection."); });

watch("value", () => {
  const view = props.value;
  if (view === shown || view.run !== run) return;
  heard = performance.now();
  const first = shown.phase === "waiting" && view.phase !== "failed" && view.prompt;
  if (first && !articles[0].childElementCount) articles.forEach((article) => add(article, view.prompt, "prompt"));
  show(view);
});

// One timer for as long as the page is there: it draws, looks whether an end is in sight, and counts the seconds.
const timer = setInterval(() => {
  if (!element.isConnected) {
    clearInterval(timer);
    seen.disconnect();
    return;
  }
  if (performance.now() - heard > PATIENCE) {
    if (BUSY.has(shown.phase)) broken("The connection was interrupted. Please try again.");
    else if (shown.phase === "reading" && voting) broken("The connection was interrupted: this vote may be lost.");
  }
  step();
}, 60);
