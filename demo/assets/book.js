// Draws a story from the component's value. A story is text: it only ever becomes text nodes, never HTML.
const book = element.querySelector(".book");
const article = element.querySelector("article");
const status = element.querySelector(".status");
const spoken = element.querySelector(".spoken");
let drawn = "";
let phase = "empty";

const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

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
    at += text.length + 1;
    if (!text.trim()) continue;
    let paragraph = article.children[count];
    if (!paragraph) {
      paragraph = document.createElement("p");
      paragraph.append(document.createElement("span"), document.createElement("span"));
      paragraph.firstChild.className = "prompt";
      paragraph.lastChild.className = "generated";
      article.append(paragraph);
    }
    put(paragraph.firstChild, text.slice(0, split));
    put(paragraph.lastChild, text.slice(split));
    count += 1;
  }
  while (article.children.length > count) article.lastChild.remove();
};

// A pressed button is disabled at once, and a disabled element loses the focus: hand it on to the next useful one.
const hand = (from, to) => {
  const ids = from.map((id) => document.getElementById(id));
  const held = document.activeElement;
  if (held === document.body || ids.includes(held)) {
    setTimeout(() => document.getElementById(to)?.focus({ preventScroll: true }), 60);
  }
};

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const pageEnd = () => document.documentElement.scrollHeight - innerHeight - scrollY < 160;

watch("value", () => {
  const view = props.value;
  const busy = view.phase === "waiting" || view.phase === "writing";
  const wasBusy = phase === "waiting" || phase === "writing";
  const following = wasBusy && pageEnd();
  draw(view.prompt, view.generated);
  put(status, view.status);
  put(spoken, view.spoken);
  for (const [id, value] of [["like", 1], ["dislike", -1]]) {
    document.getElementById(id)?.setAttribute("aria-pressed", String(view.rating === value));
  }
  book.dataset.phase = view.phase;
  book.setAttribute("aria-busy", String(busy));
  if (busy && !wasBusy) {
    hand(["write", "continue", "again"], "stop");
    const box = book.getBoundingClientRect();
    if (box.top > innerHeight * 0.6 || box.top < 0) {
      if (!view.generated) book.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
    }
  } else if (!busy && wasBusy) {
    hand(["stop"], "write");
  } else if (following && view.generated) {
    scrollTo({ top: document.documentElement.scrollHeight });
  }
  phase = view.phase;
});
