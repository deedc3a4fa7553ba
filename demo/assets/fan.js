// Sixteen futures of the story from the chosen word on, merged where they begin alike. It goes on from `words.js`.
// A limb is as high as its first word is likely; a press zooms into it, another one goes back.
const fan = document.createElement("section");
fan.className = "fan";
fan.ariaLabel = "Futures: how the story could go on";
fan.hidden = true;
book.insertBefore(fan, status);
let futures = [];
let zoomed = []; // the limbs that were zoomed into, each a branch of the one before it

const spread = async () => {
  const answer = await inquire(chosen, { futures: true });
  if (!answer) return;
  choices.hidden = true;
  futures = answer.futures;
  zoomed = [];
  fan.hidden = false;
  drawFan();
  fan.scrollIntoView({ block: "nearest" });
};

const drawFan = () => {
  const limb = zoomed.at(-1);
  const bar = document.createElement("p");
  if (limb) bar.append(plain("Go on from here", () => part(zoomed.flatMap((each) => each.words))), plain("Back", zoomOut));
  bar.append(plain("Close", close));
  fan.replaceChildren(bar, limbs(limb ? [limb] : futures, !limb));
  (limb ? bar.firstChild : fan.querySelector("li button"))?.focus({ preventScroll: true });
};

const zoomOut = () => {
  zoomed.pop();
  drawFan();
};

const limbs = (all, top) => {
  const list = document.createElement("ul");
  list.append(...all.map((limb) => {
    const { words: added, count, branches: further } = limb;
    const item = document.createElement("li");
    const likely = 2 ** -added[0][2];
    const row = plain(added.map(([word]) => word).join("").trim() || "¶", () => {
      if (zoomed.at(-1) === limb) return zoomOut();
      zoomed.push(...wayTo(zoomed.at(-1)?.branches ?? futures, limb));
      return drawFan();
    });
    row.title = `${percent(likely)}; ${count} of 16 futures`;
    row.ariaExpanded = String(zoomed.at(-1) === limb);
    const share = document.createElement("small");
    share.textContent = ` ${percent(likely)}`;
    row.append(share);
    item.style.flexGrow = String(zoomed.at(-1) === limb ? 1 : likely);
    item.append(row);
    if (further.length) item.append(limbs(further, false));
    return item;
  }));
  return list;
};

// The limbs down to this one.
const wayTo = (all, limb) => {
  for (const each of all) {
    if (each === limb) return [each];
    const way = wayTo(each.branches, limb);
    if (way.length) return [each, ...way];
  }
  return [];
};

fan.addEventListener("keydown", (event) => {
  if (event.key === "Escape" || event.key === "Backspace") {
    event.preventDefault();
    if (zoomed.length) zoomOut();
    else {
      close();
      article.focus({ preventScroll: true });
    }
  }
});
