// Continues a prompt by the ages of the run that is chosen above. Texts only become text nodes; what stands here stays.
const root = element.querySelector(".grow");
const none = root.querySelector(".none");
const form = root.querySelector(".form");
const field = root.querySelector("textarea");
const button = root.querySelector("button");
const status = root.querySelector(".status");
const spoken = root.querySelector(".spoken");
const list = root.querySelector(".grown");

const PATIENCE = 60000; // milliseconds without an age, after which the connection counts as cut
const KEPT = 4; // prompts whose ages stand on the page
const SHOWN = 160; // characters of a prompt that stand before each continuation
const number = (value) => value.toLocaleString("en-US");
let press = 0; // number of the last press; what comes of earlier ones is left out
let section = null; // of the last press, until it is done
let timer = null;

const part = (name, text, kind) => {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  node.textContent = text;
  return node;
};

window.experiments.aged = () => {
  const why = window.experiments.learned?.no_ages ?? "";
  window.experiments.say(none, why);
  form.hidden = Boolean(why) && section === null;
};

const put = (line, aloud = line) => {
  window.experiments.say(status, line);
  spoken.textContent = aloud.replaceAll("`", "");
};

// Wait for the next age, but not for ever.
const hope = () => {
  clearTimeout(timer);
  timer = setTimeout(() => { if (section) finish("The connection was interrupted. Please try again."); }, PATIENCE);
};

const finish = (line, aloud) => {
  clearTimeout(timer);
  if (!section.querySelector("li")) section.remove();
  section.removeAttribute("aria-busy");
  section = null;
  press += 1; // what still comes is left out
  button.removeAttribute("aria-disabled");
  put(line, aloud);
  window.experiments.aged();
};

const begin = () => {
  if (section) return;
  if (!field.value.trim()) {
    put("Type how the story begins.");
    field.focus();
    return;
  }
  press += 1;
  section = document.createElement("section");
  section.setAttribute("aria-busy", "true");
  list.prepend(section);
  while (list.childElementCount > KEPT) list.lastElementChild.remove();
  button.setAttribute("aria-disabled", "true"); // it keeps the focus
  put("The youngest comes first …");
  hope();
  props.value = { press, prompt: field.value, run: window.experiments.learned?.run ?? "" };
  trigger("submit");
};

const figures = ({ step, tokens, bits_per_byte: bits, held_out: heldOut }) => {
  if (step === 0) return "before training";
  const measured = bits === null ? "" : ` · ${bits.toFixed(3)} bits per byte${heldOut ? "" : " in training"}`;
  return `step ${number(step)} · ${number(tokens)} tokens read${measured}`;
};

const beginning = (prompt) => (prompt.length <= SHOWN ? prompt : `…${[...prompt].slice(-SHOWN).join("")}`);

const entry = (age, prompt) => {
  const item = document.createElement("li");
  const story = part("p", "", "story");
  story.dir = "auto";
  story.append(part("span", beginning(prompt), "prompt"), part("span", age.text, "generated"));
  if (!age.text.trim()) story.append(part("span", " … and not a word more.", "nothing"));
  else if (!age.ended) story.append(part("span", " …", "nothing"));
  item.append(part("p", figures(age), "moment"), story);
  return item;
};

const show = () => {
  const view = props.value;
  if (!section || view.press !== press || !view.ages) return;
  hope();
  if (!section.querySelector("h3") && view.count) section.append(part("h3", `How ${view.run || "the run"} grew up`), document.createElement("ol"));
  const ages = section.querySelector("ol");
  for (const age of view.ages.slice(ages?.childElementCount ?? 0)) ages.append(entry(age, view.prompt));
  if (view.done) finish(view.note || "", view.note || `All ${view.ages.length} ages have written.`);
  else if (view.ages.length) put(`${view.ages.length} of ${view.count} ages`, "");
};

button.addEventListener("click", begin);
addEventListener("offline", () => { if (section) finish("There is no connection."); });
watch("value", show);
window.experiments.aged();
