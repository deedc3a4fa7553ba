// Draws what a run wrote at each look at it, with a slider over the looks. Stories are text: they only become text nodes.
const root = element.querySelector(".learn");
const none = root.querySelector(".none");
const controls = root.querySelector(".controls");
const slider = root.querySelector("input");
const play = root.querySelector(".play");
const line = root.querySelector(".moment");
const article = root.querySelector("article");
let moments = [];
let run = "";
let timer = null;

const PACE = 900; // milliseconds that each look stays while it plays
const number = (value) => value.toLocaleString("en-US");

const part = (name, text, kind) => {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  node.textContent = text;
  return node;
};

const show = (remember) => {
  const moment = moments[Number(slider.value)];
  if (!moment) return;
  const bits = moment.bits_per_byte === null ? "" : ` · ${moment.bits_per_byte.toFixed(3)} bits per byte`;
  line.textContent = `step ${number(moment.step)} · ${number(moment.tokens)} tokens read${bits}`;
  slider.setAttribute("aria-valuetext", line.textContent);
  article.replaceChildren(...moment.stories.map(([prompt, generated]) => {
    const story = part("p", "", "story");
    story.append(part("span", prompt, "prompt"), part("span", generated, "generated"));
    if (!generated.trim()) story.append(part("span", " … and not a word more.", "nothing"));
    return story;
  }));
  if (remember) window.experiments.address({ story: run, step: String(moment.step) });
};

const halt = () => {
  clearInterval(timer);
  timer = null;
  play.setAttribute("aria-label", "Play");
  play.classList.remove("playing");
};

play.addEventListener("click", () => {
  if (timer !== null) {
    halt();
    return;
  }
  if (Number(slider.value) >= moments.length - 1) slider.value = "0";
  show(false);
  play.setAttribute("aria-label", "Pause");
  play.classList.add("playing");
  timer = setInterval(() => {
    if (!element.isConnected || Number(slider.value) >= moments.length - 1) {
      halt();
      return;
    }
    slider.value = String(Number(slider.value) + 1);
    show(false);
  }, PACE);
});

slider.addEventListener("input", () => {
  halt();
  show(false);
  window.experiments.moment?.(moments[Number(slider.value)]); // the crosshair goes there
});
slider.addEventListener("change", () => show(true));

const fill = () => {
  const value = props.value;
  // New samples of the run that is shown: who looks at an earlier one stays there.
  const stay = value.run === run && value.at === null && Number(slider.value) < moments.length - 1;
  const seen = stay ? moments[Number(slider.value)].step : value.at;
  if (!stay) halt();
  moments = value.moments;
  run = value.run;
  window.experiments.say(none, value.note);
  window.experiments.learned = value;
  window.experiments.aged?.(); // how the run grew up, below
  controls.hidden = article.hidden = moments.length === 0;
  if (!moments.length) return;
  slider.max = String(moments.length - 1);
  const at = moments.findIndex((moment) => moment.step === seen);
  slider.value = String(at < 0 ? moments.length - 1 : at);
  show(false);
};
fill();
watch("value", fill);
