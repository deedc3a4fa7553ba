// What the parts of the Experiments page share. Nothing is sent by this.
window.experiments = {
  // What is chosen stands in the address, so that a link shows the same.
  address(values) {
    const address = new URL(location.href);
    for (const [name, value] of Object.entries(values)) {
      if (value) address.searchParams.set(name, value);
      else address.searchParams.delete(name);
    }
    history.replaceState(null, "", address);
  },

  // Gradio names the fields above its tables by a title only, which not every program reads.
  label() {
    for (const [table, label] of [["runs", "Filter runs"], ["evaluations", "Search evaluations"], ["benchmarks", "Search benchmarks"]]) {
      window.story.whenThere(`#${table} .search-input`, (field) => field.setAttribute("aria-label", label));
    }
  },

  // Put a line into a node as text; what stands between backticks is a command.
  say(node, line) {
    node.replaceChildren(...(line || "").split("`").map((text, at) => {
      if (at % 2 === 0) return document.createTextNode(text);
      const code = document.createElement("code");
      code.textContent = text;
      return code;
    }));
  },
};
