// Draws a story from the component's value. A story is text: it only ever becomes text nodes, never HTML.
const book = element.querySelector(".book");
const article = element.querySelector("article");
const status = element.querySelector(".status");
const spoken = element.querySelector(".spoken");
let drawn = "";
let phase = "empty";

const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

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
