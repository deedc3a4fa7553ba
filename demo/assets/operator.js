
// The operator's part of versions.js: signs in, shows what an action would do, and does it when that is confirmed. The token is in this variable only, and goes in the bodies of requests.
const box = element.querySelector(".operator");
const [signIn, signedIn, said, dialog] = [".sign-in", ".signed-in", ".said", "dialog"].map((part) => box.querySelector(part));
const secret = signIn.querySelector("input");
const [yes] = dialog.querySelectorAll("button");
const TITLES = {
  promote: [(version) => `Promote version ${version}?`, "Promote"],
  rollback: [() => "Roll back to the champion before?", "Roll back"],
  switch: [() => "Send new stories to the other deployment?", "Switch"],
};
let token = "";
let busy = false;

const say = (line) => window.experiments.say(said, line);

const sign = (inside, mayswitch) => {
  signIn.hidden = inside;
  signedIn.hidden = !inside;
  signedIn.querySelector(".switch").hidden = !mayswitch;
  offer();
};

// One question at a time; null: it was not answered.
const ask = async (question) => {
  if (busy) return null;
  busy = true;
  say("Asking …");
  const answer = await server.operate({ token, ...question }).catch(() => null);
  busy = false;
  say(answer === null ? "The server does not answer; look at the versions before you try again." : answer.note);
  if (answer !== null && !answer.signed_in) {
    token = "";
    sign(false, false);
  }
  return answer;
};

const confirmed = (action, version, line) => new Promise((resolve) => {
  const [title, verb] = TITLES[action];
  dialog.querySelector("h3").textContent = title(version);
  window.experiments.say(dialog.querySelector("p"), line);
  yes.textContent = verb;
  dialog.returnValue = "no"; // so that Escape means no
  dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  dialog.showModal();
});

const operate = async (action, version = "") => {
  let answer = await ask({ action, version });
  while (answer?.plan) { // more than once where something changed in between
    if (!await confirmed(action, version, answer.note)) {
      say("Nothing was changed.");
      break;
    }
    answer = await ask({ action, version, plan: answer.plan });
  }
  if (answer?.done) trigger("submit");
  said.focus();
};

// A button on each version that passed the gate and is not the champion.
const offer = () => {
  for (const { id, number, verdict, aliases, origin } of props.value.versions) {
    const node = root.querySelector(`#${id}`);
    node?.querySelector(".moves")?.remove();
    if (!token || !node || origin || verdict !== "pass" || aliases.includes("champion")) continue;
    const button = part("button", "promote", "Promote …");
    button.type = "button";
    button.setAttribute("aria-label", `Promote version ${number} …`);
    button.addEventListener("click", () => operate("promote", String(number)));
    node.querySelector(".facts").after(part("p", "moves", button));
  }
};

signIn.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!isSecureContext) {
    say("Sign in over HTTPS, or on the machine that serves: here everyone on the way could read the token.");
    return;
  }
  if (busy) return;
  token = secret.value;
  secret.value = "";
  const answer = await ask({ action: "sign in" });
  if (answer === null) token = "";
  if (!token) return;
  sign(true, answer.switch);
  say("Signed in, in this tab and until it is reloaded.");
});
signedIn.querySelector(".rollback").addEventListener("click", () => operate("rollback"));
signedIn.querySelector(".switch").addEventListener("click", () => operate("switch"));
signedIn.querySelector(".sign-out").addEventListener("click", () => {
  token = "";
  sign(false, false);
  say("Signed out.");
  secret.focus();
});
watch("value", offer);
