// What the page does in the browser alone: keys, paper, examples, keeping, saving and linking. Nothing here talks to a server.
// It stands at the head of the body, before anything is painted and before Gradio's scripts.
(() => {
  "use strict";
  // Gradio takes words and `lang` from the browser's language, but the page is in English.
  Object.defineProperty(navigator, "language", { value: "en" });

  // Light or dark: the address says so, or the last press of the button, or the system.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const setting = (name, value) => { // what holds for all tabs and visits: read, or with a value, set
    try {
      if (value === undefined) return localStorage.getItem(`story-${name}`);
      localStorage.setItem(`story-${name}`, value);
    } catch { /* forbidden: for this visit only */ }
    return null;
  };
  let chosen = new URLSearchParams(location.search).get("__theme") || setting("paper");
  const isDark = () => (chosen === "dark" || chosen === "light" ? chosen === "dark" : system.matches);
  const paint = () => {
    const dark = isDark();
    if (document.body.classList.contains("dark") !== dark) document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    document.getElementById("paper")?.setAttribute("aria-pressed", String(dark));
  };
  paint();
  system.addEventListener("change", paint);
  new MutationObserver(paint).observe(document.body, { attributeFilter: ["class"] }); // Gradio sets the system's

  const button = (id) => document.getElementById(id);
  const press = (id) => {
    const target = button(id);
    if (target && !target.disabled) target.click();
  };

  // Keyboard first: Ctrl/⌘+Enter writes, Esc stops, wherever the focus is.
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter and Esc belong to the input method while it composes a character
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      const field = document.activeElement;
      if (field && field.matches("input")) {
        field.blur(); // a number field hands over its value when it is left
        field.focus();
      }
      setTimeout(() => press("write"), 0);
    } else if (event.key === "Escape") {
      press("stop");
    }
  }, true);

  const say = (message) => {
    const spoken = document.querySelector("#book .spoken");
    const note = document.querySelector("#book .status");
    if (spoken) spoken.textContent = message;
    if (note) note.textContent = message;
  };

  // On a phone the focus would push a keyboard up over the page.
  const keyboard = () => matchMedia("(hover: hover)").matches;

  // Gradio builds the page step by step, after this script has run.
  const whenThere = (selector, then) => {
    const found = document.querySelector(selector);
    if (found) {
      then(found);
      return;
    }
    const watcher = new MutationObserver(() => {
      const late = document.querySelector(selector);
      if (late) {
        watcher.disconnect();
        then(late);
      }
    });
    watcher.observe(document.documentElement, { childList: true, subtree: true });
  };

  whenThere("#paper", (toggle) => {
    paint();
    toggle.addEventListener("click", () => {
      chosen = isDark() ? "light" : "dark";
      setting("paper", chosen);
      paint();
    });
  });
  whenThere("#prompt textarea", (prompt) => {
    prompt.dir = "auto";
    const seen = { visibilityProperty: true };
    const focus = () => (prompt.checkVisibility(seen) ? prompt.focus() : requestAnimationFrame(focus));
    if (keyboard()) focus();
  });
  for (const id of ["wishes", "more"]) {
    whenThere(`#${id} > button`, (fold) => {
      // Gradio's accordion does not say whether it is open.
      const announce = () => fold.setAttribute("aria-expanded", String(fold.classList.contains("open")));
      new MutationObserver(announce).observe(fold, { attributes: true, attributeFilter: ["class"] });
      announce();
    });
  }

  // What the user has is kept for this tab, by address: the fields, and the view of the story.
  const fragment = () => (location.hash.startsWith("#tree=") ? location.hash : "");
  const place = () => `story ${location.pathname}${location.search}${fragment()}`;
  const read = () => {
    try { return JSON.parse(sessionStorage.getItem(place())); } catch { return null; } // storage may be forbidden
  };
  let now = read() ?? {};
  const large = {}; // by name: what is kept beside the rest, for it is large and changes seldom

  window.story = {
    kept: read(), // what was there when the page was opened, or null
    keep(name, value) {
      now = { ...now, [name]: value };
      try {
        sessionStorage.setItem(place(), JSON.stringify(now));
        if (name === "view") sessionStorage.setItem("last story", place());
      } catch { /* forbidden or full */ }
    },

    // What was kept of the page whose story was the last to change, or null.
    last() {
      try { return JSON.parse(sessionStorage.getItem(sessionStorage.getItem("last story"))); } catch { return null; }
    },

    now: (name) => now[name],

    apart(name, value) {
      if (value !== undefined) large[name] = value;
      try {
        if (value === undefined) return JSON.parse(sessionStorage.getItem(`${place()} ${name}`));
        sessionStorage.setItem(`${place()} ${name}`, JSON.stringify(value));
      } catch { /* forbidden or full */ }
      return null;
    },

    // The fields' values as they were, for the form.
    fields(count) {
      return this.kept?.fields ?? Array(count).fill({ __type__: "update" });
    },

    // How the page is opened: with what was there before, or for the first time in this browser.
    opening() {
      const opening = { kept: this.kept !== null || fragment() !== "", first: setting("visited") === null };
      setting("visited", "yes");
      return opening;
    },

    setting,
    whenThere,

    // A message beside a field is of no use in a closed fold.
    unfold(id) {
      const fold = document.querySelector(`#${id} > button`);
      if (!fold.classList.contains("open")) fold.click();
    },

    // Put an example where the prompt is, as typing would: the browser's undo brings back what stood there.
    begin(text) {
      const prompt = document.querySelector("#prompt textarea");
      prompt.focus({ preventScroll: true });
      prompt.select();
      document.execCommand("insertText", false, text);
      if (!keyboard()) prompt.blur();
    },

    // Put this address into the clipboard and the address bar; what is kept, is kept for it from now on.
    async link(address, view, opens) {
      history.replaceState(null, "", address);
      this.keep("view", view);
      for (const [name, value] of Object.entries(large)) this.apart(name, value);
      try {
        await navigator.clipboard.writeText(location.href);
        say(`Link copied. ${opens}`);
      } catch { // no clipboard without https, or the user refused
        say(`${opens} Copy it from the address bar.`);
      }
    },
  };
})();
