// What the page does in the browser alone: keys, paper, examples, saving and linking. Nothing here talks to a server.
(() => {
  "use strict";
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

  const storedTheme = () => {
    try { return localStorage.getItem("story-paper"); } catch { return null; } // storage may be forbidden
  };

  // Where a keyboard is at hand; on a phone the focus would push one up over the page.
  const focusPrompt = () => {
    if (matchMedia("(hover: hover)").matches) document.querySelector("#prompt textarea")?.focus();
  };

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

  whenThere("#prompt textarea", focusPrompt);
  whenThere("#more > button", (more) => {
    // Gradio's accordion does not say whether it is open.
    const isOpen = () => more.classList.contains("open");
    const announce = () => more.setAttribute("aria-expanded", String(isOpen()));
    new MutationObserver(announce).observe(more, { attributes: true, attributeFilter: ["class"] });
    announce();
    // A message beside a field is of no use in a closed drawer.
    new MutationObserver((changes) => {
      const added = changes.flatMap((change) => [...change.addedNodes]);
      if (!isOpen() && added.some((node) => node.classList?.contains("validation-error"))) more.click();
    }).observe(more.parentElement, { childList: true, subtree: true });
  });

  window.story = {
    // Light or dark: the system's theme until the user presses the button, which is then stored.
    paper(element) {
      const toggle = element.querySelector("#paper");
      const show = () => {
        const dark = document.body.classList.contains("dark");
        toggle.setAttribute("aria-pressed", String(dark));
        document.documentElement.style.colorScheme = dark ? "dark" : "light";
      };
      const theme = storedTheme();
      if (theme && !new URLSearchParams(location.search).has("__theme")) {
        document.body.classList.toggle("dark", theme === "dark");
      }
      toggle.addEventListener("click", () => {
        const dark = document.body.classList.toggle("dark");
        try { localStorage.setItem("story-paper", dark ? "dark" : "light"); } catch { /* kept for this visit only */ }
        show();
      });
      new MutationObserver(show).observe(document.body, { attributes: true, attributeFilter: ["class"] });
      show();
    },

    begin(text) {
      focusPrompt();
      return text;
    },

    save(view) {
      const file = new Blob([view.prompt + view.generated + "\n"], { type: "text/plain;charset=utf-8" });
      const anchor = document.createElement("a");
      anchor.href = URL.createObjectURL(file);
      anchor.download = view.filename || "story.txt";
      anchor.click();
      setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
    },

    async link(view) {
      const address = new URL(location.href);
      address.search = view.link;
      history.replaceState(null, "", address);
      try {
        await navigator.clipboard.writeText(address.href);
        say("Link copied. It opens this prompt with these settings.");
      } catch { // no clipboard without https, or the user refused
        say("This page’s address now opens this prompt with these settings: copy it from the address bar.");
      }
    },
  };
})();
