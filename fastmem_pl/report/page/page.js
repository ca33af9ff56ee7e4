/** What the page does: it follows the sections, and browses the samples. */

/** Mark in the contents where the reader is. */
function followSections() {
  const links = [...document.querySelectorAll(".contents a:not(.brand)")];
  const sections = links.map((link) => document.querySelector(link.hash));
  const observer = new IntersectionObserver(
    () => {
      const line = innerHeight / 3;
      const current = sections.findLastIndex((section) => section.getBoundingClientRect().top < line);
      links.forEach((link, index) => {
        if (index === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      });
    },
    { rootMargin: "0px 0px -66% 0px" },
  );
  sections.forEach((section) => observer.observe(section));
}

/** The filters, the list and the sample, and the page's address, which says what they show. */
class SampleBrowser {
  constructor(data) {
    this.browser = new Browser(data);
    const compared = data.variants.findIndex(
      ({ memory, baselines }) => memory && baselines.some((number) => number !== null),
    );
    const method = Math.max(compared, 0);
    this.defaults = { query: "", dataset: null, method, score: "", state: "all" };
    this.filter = { ...this.defaults };
    this.current = -1;
    this.list = new List((index) => this.row(index));
    this.makeControls();
    this.listen();
    byId("waiting").remove();
    byId("browser").hidden = false;
    this.readAddress(true);
    this.prepareSearch();
  }

  makeControls() {
    const { variants, datasets, scores, binary } = this.browser;
    const option = (value, text) => new Option(text, value);
    byId("dataset").append(option("", "all"), ...datasets.map((name, index) => option(index, name)));
    byId("dataset-field").hidden = datasets.length < 2;
    byId("method").append(...variants.map(({ label }, index) => option(index, label)));
    byId("score").append(option("", "main score"), ...binary.map((name) => option(name, scores[name].label)));
    this.chips = STATES.map((state) => {
      const chip = fromTemplate("chip");
      const input = chip.querySelector("input");
      input.value = state;
      input.addEventListener("change", () => this.change({ state }));
      byId("states").append(chip);
      return { input, label: chip, name: chip.querySelector(".name"), number: chip.querySelector(".number") };
    });
  }

  listen() {
    const form = byId("filters");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", (event) => {
      event.preventDefault();
      this.change(this.defaults);
      byId("query").focus();
    });
    byId("query").addEventListener("input", ({ target }) => this.change({ query: target.value }));
    byId("dataset").addEventListener("change", ({ target }) =>
      this.change({ dataset: target.value === "" ? null : Number(target.value) }),
    );
    byId("method").addEventListener("change", ({ target }) => this.change({ method: Number(target.value) }));
    byId("score").addEventListener("change", ({ target }) => this.change({ score: target.value }));
    this.list.box.addEventListener("click", ({ target }) => {
      const row = target.closest(".row");
      if (!row) return;
      this.go(Number(row.dataset.place));
      // One column: the sample stands below the list.
      if (byId("detail").offsetTop > this.list.box.offsetTop) byId("detail").scrollIntoView();
    });
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    byId("back").addEventListener("click", () => {
      byId("filters").scrollIntoView();
      this.list.box.focus({ preventScroll: true });
    });
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("hashchange", () => this.readAddress(false));
  }

  key(event) {
    if (event.defaultPrevented || event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    const query = byId("query");
    const inQuery = event.target === query;
    const inList = event.target === this.list.box;
    const typing = event.target.closest?.("input, select, textarea, [contenteditable]");
    const page = Math.max(1, Math.floor(this.list.box.clientHeight / this.list.height) - 1);
    const jumps = { PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    const steps = { ArrowDown: 1, ArrowUp: -1, ...(inList && jumps) };
    if (inQuery && ["Escape", "Enter"].includes(event.key)) this.list.box.focus({ preventScroll: true });
    else if (event.key === "/" && !typing) {
      query.focus();
      query.select();
    } else if ((event.key === "j" || event.key === "k") && !typing) this.step(event.key === "j" ? 1 : -1);
    else if (event.key in steps && (inList || inQuery)) this.step(steps[event.key]);
    else return;
    event.preventDefault();
  }

  /** Change settings of the filters and show what passes. */
  change(settings) {
    Object.assign(this.filter, settings);
    this.apply();
    this.writeAddress();
  }

  apply() {
    const { query, dataset, method, score, state } = this.filter;
    const about = `${method} ${score}`;
    if (about !== this.bitsAbout) [this.bits, this.bitsAbout] = [this.browser.bits(method, score), about];
    this.terms = termsOf(query);
    const { matches, counts } = this.browser.select({ terms: this.terms, dataset, state }, this.bits);
    this.matches = matches;
    this.showControls(counts);
    byId("list").hidden = matches.length === 0;
    byId("detail").hidden = matches.length === 0;
    byId("nothing").hidden = matches.length > 0;
    this.list.show(matches);
    // The sample at hand stays where it passes the filters.
    const place = matches.indexOf(this.current);
    if (place < 0) this.list.box.scrollTop = 0;
    this.go(place < 0 ? 0 : place, false);
  }

  showControls(counts) {
    const { query, dataset, method: chosen, score, state } = this.filter;
    const { variants, samples } = this.browser;
    if (byId("query").value !== query) byId("query").value = query;
    byId("dataset").value = dataset ?? "";
    byId("method").value = chosen;
    byId("score").value = score;
    const by = variants[chosen]?.memory ? "FastMem" : variants[chosen]?.label;
    const method = variants[chosen]?.label;
    const names = {
      all: ["all", "whatever the answers"],
      fixed: [`fixed by ${by}`, `its baseline is wrong, ${method} right (or better by more than ${STEP})`],
      broken: [`broken by ${by}`, `its baseline is right, ${method} wrong (or worse by more than ${STEP})`],
      differ: ["methods differ", "answers differ in more than case and punctuation"],
      format: ["format failure", `${method} leaves out the form that the prompt asks for`],
      original: ["follows the memorized world", `${method} repeats what the context contradicts`],
      failed: ["not memorized", `${method} answered without a memory, which could not be made`],
      cut: ["context cut off", "the context was over the limit"],
    };
    this.chips.forEach(({ input, label, name, number }, index) => {
      input.checked = STATES[index] === state;
      [name.textContent, label.title] = names[STATES[index]];
      number.textContent = count(counts[index]);
    });
    const all = this.matches.length === samples.length;
    const of = all ? "" : `${count(this.matches.length)} of `;
    byId("count").textContent = `${of}${count(samples.length)} sample${samples.length === 1 ? "" : "s"}`;
    const same = Object.keys(this.defaults).every((name) => this.filter[name] === this.defaults[name]);
    byId("reset").hidden = same;
  }

  step(by) {
    if (!this.matches.length) return;
    this.go(Math.min(Math.max(this.list.selected + by, 0), this.matches.length - 1));
    // The pager stays in sight where the reader had gone down a long sample.
    const top = byId("detail").getBoundingClientRect().top;
    if (top < 0 || top > innerHeight) byId("detail").scrollIntoView();
  }

  /** Show the sample at a place in the list. */
  go(place, byHand = true) {
    const index = this.matches[place] ?? -1;
    this.current = index;
    this.list.select(index < 0 ? -1 : place);
    if (index < 0) return;
    byId("place").textContent = `${count(place + 1)} of ${count(this.matches.length)}`;
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === this.matches.length - 1;
    const { method, score } = this.filter;
    showSample(this.browser, this.browser.samples[index], { method, score, terms: this.terms });
    if (byHand) this.writeAddress();
  }

  row(index) {
    const sample = this.browser.samples[index];
    const { datasets, variants, scores } = this.browser;
    const name = this.browser.scoreOf(sample, this.filter.score);
    const row = fromTemplate("row");
    const title = titleOf(sample);
    const marks = this.browser.answering[sample.dataset].map((variant) => {
      const [className, sign, words] = shortMark(answerOf(sample, variant), scores[name], name);
      const mark = element("span", className, sign);
      mark.title = `${variants[variant].label}: ${words}`;
      return mark;
    });
    row.querySelector(".title").textContent = title;
    const which = datasets.length > 1 ? `${datasets[sample.dataset]} ${sample.id}` : sample.id;
    row.querySelector(".which").textContent = which;
    markChange(row.querySelector(".change"), this.browser.changeOf(sample, this.filter.method, name));
    row.querySelector(".marks").append(...marks);
    const change = row.querySelector(".change").textContent;
    const label = [title, which, change, ...marks.map((mark) => mark.title)];
    row.setAttribute("aria-label", label.filter(Boolean).join(", "));
    return row;
  }

  /** Take filters and sample from the page's address; an address of a section of the page changes nothing. */
  readAddress(first) {
    const address = location.hash.slice(1);
    if (!address.includes("=") && !first) return;
    clearTimeout(this.writing);
    const given = new URLSearchParams(address.includes("=") ? address : "");
    const { datasets, variants, scores, keys } = this.browser;
    const place = (names, name, otherwise) => (names.includes(name) ? names.indexOf(name) : otherwise);
    this.filter = {
      query: given.get("q") ?? "",
      dataset: place(datasets, given.get("dataset"), null),
      method: place(variants.map(({ label }) => label), given.get("method"), this.defaults.method),
      score: scores[given.get("score")]?.binary ? given.get("score") : "",
      state: STATES.includes(given.get("state")) ? given.get("state") : "all",
    };
    if (given.has("sample")) this.current = keys.indexOf(given.get("sample"));
    this.apply();
    if (address.includes("=")) byId("samples").scrollIntoView();
  }

  /** Keep filters and sample in the page's address, where they can be copied from; not at every key. */
  writeAddress() {
    clearTimeout(this.writing);
    this.writing = setTimeout(() => {
      const { query, dataset, method, score, state } = this.filter;
      const { datasets, variants, keys } = this.browser;
      const parts = {
        q: query,
        dataset: dataset === null ? "" : datasets[dataset],
        method: method === this.defaults.method ? "" : variants[method].label,
        score,
        state: state === "all" ? "" : state,
        sample: this.current < 0 ? "" : keys[this.current],
      };
      const given = Object.entries(parts).filter(([, value]) => value !== "");
      history.replaceState(null, "", `#${new URLSearchParams(given)}`);
    }, 150);
  }

  /** Make the searched texts while nothing else is to do, so that the first key finds them. */
  prepareSearch() {
    const later = globalThis.requestIdleCallback ?? ((work) => setTimeout(work, 20));
    let next = 0;
    const work = () => {
      const end = performance.now() + 8;
      while (next < this.browser.samples.length && performance.now() < end) this.browser.text(next++);
      if (next < this.browser.samples.length) later(work);
    };
    later(work);
  }
}

followSections();
const embedded = byId("data");
if (embedded) {
  new SampleBrowser(JSON.parse(embedded.textContent));
  embedded.remove();
}
