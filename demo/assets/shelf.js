// The user's stories in this browser, and what can be taken from the page: files, a cover, links. It goes on from `tree.js`.
const SHELF = 30; // stories at most
const MOST_TEXT = 2_000_000; // characters at most: of the five million that a browser has for all of the page
const LONGEST_LINK = 16_000; // characters
const stories = element.querySelector(".shelf ul");
const clear = element.querySelector(".shelf .clear");

const shelf = () => {
  try { return JSON.parse(window.story.setting("shelf")) ?? []; } catch { return []; }
};

const fill = (entries) => {
  const kept = entries.slice(0, SHELF);
  let text = JSON.stringify(kept);
  while (text.length > MOST_TEXT) {
    kept.pop();
    text = JSON.stringify(kept);
  }
  window.story.setting("shelf", text);
  drawShelf(kept);
};

// An example is nobody's story until somebody has forked it.
const shelve = (kept) => {
  if (id && shown.generated && !(shown.example && branches.length < 2)) fill([{ ...kept, when: Date.now() }, ...shelf().filter((each) => each.id !== id)]);
};

const titleOf = (text) => {
  const first = text.trim().split(/(?<=[.!?…])\s|\n/, 1)[0];
  return first.length > 70 ? `${first.slice(0, 69).replace(/\s+\S*$/, "")} …` : first || "A story";
};
const textOf = ({ prompt, all, now }) => {
  const { view } = unpack(all, prompt)[now];
  return view ? view.prompt + view.generated : prompt;
};

const drawShelf = (entries) => {
  if (!stories.closest("details").open) return;
  clear.hidden = entries.length === 0;
  stories.replaceChildren(...entries.map((entry) => {
    const [row, about] = [document.createElement("li"), document.createElement("small")];
    const title = titleOf(textOf(entry));
    const others = entry.all.filter((each) => !each.gone).length - 1;
    about.textContent = `${new Date(entry.when).toLocaleDateString("en")}${others ? `, ${others} more branch${others > 1 ? "es" : ""}` : ""}`;
    const gone = plain("Delete", () => remove(entry));
    gone.ariaLabel = `Delete ${title}`;
    row.append(plain(title, () => bringBack(entry)), about, gone);
    return row;
  }));
};

const bringBack = (entry) => {
  if (BUSY.has(shown.phase)) return;
  setDice(false);
  close();
  branches = unpack(entry.all, entry.prompt);
  branch = entry.now;
  id = entry.id;
  fresh = false;
  comparison.hidden = true;
  read = Infinity;
  show({ ...branches[branch].view, run });
  book.scrollIntoView({ block: "start" });
  article.focus({ preventScroll: true });
};

const remove = (entry) => {
  const [before, was] = [shelf(), id];
  if (entry.id === id) id = "";
  fill(before.filter((each) => each.id !== entry.id));
  undoable(`“${titleOf(textOf(entry))}” was deleted.`, () => { id = was; fill(before); });
};

clear.addEventListener("click", () => {
  const [before, was] = [shelf(), id];
  id = "";
  fill([]);
  undoable(`${before.length} ${before.length === 1 ? "story was" : "stories were"} deleted.`, () => { id = was; fill(before); });
});
addEventListener("storage", (event) => { if (event.key === "story-shelf") drawShelf(shelf()); });

// Files
const download = (blob, kind) => {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = (shown.filename || "story.txt").replace(/txt$/, kind);
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
};
const whole = () => shown.prompt + shown.generated;
const settings = () => Object.fromEntries(new URLSearchParams(shown.link));
const file = (text, kind, type) => download(new Blob([text], { type: `${type};charset=utf-8` }), kind);

const markdown = () => {
  const plainly = (text) => text.replace(/[\\`*_{}[\]<>#|~]/g, "\\$&").replace(/^(\s*\d*)([-+.)])(?=\s)/gm, "$1\\$2");
  const about = Object.entries(settings()).filter(([name]) => name !== "prompt").map(([name, value]) => `${name} ${value}`);
  const parts = [`# ${plainly(titleOf(whole()))}`, ...whole().split(/\n+/).map(plainly), "---", plainly(about.join(", "))];
  return `${parts.filter((part) => part.trim()).join("\n\n")}\n`;
};

const json = () => `${JSON.stringify({
  prompt: shown.prompt,
  story: whole(),
  settings: settings(),
  words: shown.words.map(([text, tokens, bits]) => ({ text, tokens, bits })),
  branches: branches.flatMap(({ parent, at, word, star, gone, view }, number) => (gone || !view ? [] : [{
    number, parent, at, word, star, story: view.prompt + view.generated,
  }])),
}, null, 2)}\n`;

// A cover in the colors of the page: the first sentence, and how the story begins.
const cover = () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [1200, 1600];
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  const color = (name) => style.getPropertyValue(name).trim();
  const face = style.getPropertyValue("--book-face");
  const lines = (text, width) => text.split(/\s+/).reduce((all, word) => {
    const longer = all.length ? `${all.at(-1)} ${word}` : word;
    if (all.length && pen.measureText(longer).width <= width) all[all.length - 1] = longer;
    else all.push(word);
    return all;
  }, []);
  const write = (text, size, top, bottom, slant = "") => {
    pen.font = `${slant} ${size}px ${face}`;
    let y = top;
    for (const line of lines(text, 880)) {
      if (y > bottom) break;
      pen.fillText(line, 600, y);
      y += size * 1.4;
    }
    return y;
  };
  pen.fillStyle = color("--leaf");
  pen.fillRect(0, 0, 1200, 1600);
  pen.strokeStyle = color("--rule");
  pen.lineWidth = 3;
  pen.strokeRect(60, 60, 1080, 1480);
  pen.textAlign = "center";
  pen.fillStyle = color("--accent");
  const below = write(titleOf(whole()), 76, 290, 700);
  pen.font = `60px ${face}`;
  pen.fillText("❧", 600, below + 40);
  pen.fillStyle = color("--ink");
  const title = titleOf(whole()).replace(/ …$/, "");
  write(whole().trim().slice(title.length).trim(), 40, below + 150, 1330);
  pen.fillStyle = color("--faint");
  write(`Write me a story · seed ${Math.max(0, shown.seed)}`, 32, 1470, 1470, "italic");
  canvas.toBlob((blob) => download(blob, "png"), "image/png");
};

// Links. A story that one request wrote is its prompt, settings and seed. A tree is that, and where each branch parts, in the
// fragment of the address, which no browser sends.
const squeezed = async (value, Stream, kind) => new Response(new Blob([value]).stream().pipeThrough(new Stream(kind))).arrayBuffer();
const encode = async (tree) => {
  const bytes = new Uint8Array(await squeezed(JSON.stringify(tree), CompressionStream, "deflate-raw"));
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
};
const decode = async (text) => {
  const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (each) => each.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(await squeezed(bytes, DecompressionStream, "deflate-raw")));
};

// Of each branch: its parent, the words that it shares with that, the tokens of its own words that are given, the link by which the rest is
// written or none, whether it is starred, whether it has ended.
const treeOf = () => {
  const kept = branches.map((each, number) => ({ ...each, number })).filter(({ gone, view }) => !gone && view);
  const links = [...new Set(kept.filter((each) => each.whole).map((each) => each.view.link))];
  return {
    prompt: branches[0].view.prompt,
    version: settings().model ?? "",
    links,
    now: kept.findIndex(({ number }) => number === branch),
    branches: kept.map(({ parent, at, hand, whole: again, star, view }) => [
      kept.findIndex(({ number }) => number === parent), at,
      view.words.slice(at, again ? at + hand : undefined).map(([, tokens]) => tokens),
      again ? links.indexOf(view.link) : -1, Number(star), Number(view.phase === "ended"),
    ]),
  };
};

const link = async () => {
  const alone = branches.filter((each) => !each.gone).length < 2;
  if (alone && shown.link && (branches[0]?.whole || !shown.words.length)) {
    window.story.link(`${location.pathname}?${shown.link}`, shown, "It opens this prompt with these settings.");
    return;
  }
  const tree = `tree=${await encode(treeOf())}`;
  if (tree.length > LONGEST_LINK) put(status, "This tree is too large for a link. Prune branches, or save it as .json.");
  else window.story.link(`${location.pathname}#${tree}`, shown, "It opens this story with its branches.");
};

const openTree = async (text) => {
  const refused = (message) => show({ ...empty, run, phase: "failed", status: message, spoken: message });
  heard = performance.now() + 60_000; // no view comes before the answer
  show({ ...empty, run, phase: "waiting", status: "Opening the story of the link…" });
  const tree = await decode(text).catch(() => null);
  const answer = tree ? await server.regrow(tree).catch(() => null) : { error: "This link is damaged." };
  if (!answer || answer.error) {
    refused(answer?.error ?? OFFLINE);
    return;
  }
  branches = answer.branches.map((each) => {
    const words = answer.branches[each.parent]?.view.words ?? [];
    return { ...each, gone: false, word: each.parent < 0 ? "" : nameAt(words.slice(0, each.at), each.view.words[each.at]), view: { ...empty, ...each.view } };
  });
  branch = answer.now;
  wasBusy = false; // what is shown now was not written by a request of this page
  show({ ...branches[branch].view, run });
};

const OUT = {
  save: () => file(`${whole()}\n`, "txt", "text/plain"),
  "save-md": () => file(markdown(), "md", "text/markdown"),
  "save-json": () => file(json(), "json", "application/json"),
  "save-png": cover,
  link,
};
Object.assign(PRESSES, OUT);

// What was there before a reload, another page or a restart of the server is there again; else what a link names.
const keptTree = window.story.apart("branches");
const kept = window.story.kept?.view;
const linked = new URLSearchParams(location.hash.slice(1)).get("tree");
if (kept) {
  run = kept.run;
  if (keptTree) {
    branches = unpack(keptTree.all, keptTree.prompt);
    branch = keptTree.now;
    id = keptTree.id;
  }
  const cutOff = "The page was left before this story had ended. Press Continue to go on.";
  show(BUSY.has(kept.phase) ? { ...kept, phase: kept.generated ? "open" : "failed", status: cutOff, spoken: cutOff } : kept);
} else if (linked) openTree(linked);
for (const kind of ["md", "json", "png"]) {
  window.story.whenThere(`#save-${kind}`, (made) => { made.ariaLabel = kind === "png" ? "A cover as .png" : `Save as .${kind}`; });
}
addEventListener("hashchange", () => { if (location.hash.startsWith("#tree=")) location.reload(); });
stories.closest("details").addEventListener("toggle", () => drawShelf(shelf()));
for (const row of ["actions", "rating", "keep"]) { // the buttons may come later than this script
  if (row !== "rating" || button(row)) window.story.whenThere(`#${row} button:last-of-type`, enable);
}
