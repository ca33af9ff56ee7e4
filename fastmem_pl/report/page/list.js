/** Elements and the list. Data is untrusted: it is only ever set as textContent. */

const byId = (id) => document.getElementById(id);

/** An element with text. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);

/** A number with its thousands apart. */
const count = (number) => number.toLocaleString("en");

/** The list: only the rows in sight are in the document, so 10,000 samples cost as much as 20. */
class List {
  /** @param {(index: number) => HTMLElement} makeRow of the sample of that number */
  constructor(makeRow) {
    this.box = byId("list");
    this.rows = byId("rows");
    this.makeRow = makeRow;
    this.matches = [];
    this.selected = -1;
    this.height = 72;
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw(true)).observe(this.box);
  }

  show(matches) {
    this.matches = matches;
    this.draw(true);
  }

  /** @param {number} place in the list, -1 for none */
  select(place, reveal = true) {
    this.selected = place;
    if (reveal && place >= 0) {
      const top = place * this.height;
      const { scrollTop, clientHeight } = this.box;
      const bottom = top + this.height;
      if (top < scrollTop) this.box.scrollTop = top;
      else if (bottom > scrollTop + clientHeight) this.box.scrollTop = bottom - clientHeight;
    }
    this.draw(true);
  }

  draw(always = false) {
    // First, since the box is no higher than its rows.
    this.rows.style.height = `${this.matches.length * this.height}px`;
    const { scrollTop, clientHeight } = this.box;
    const first = Math.max(0, Math.floor(scrollTop / this.height) - 5);
    const last = Math.min(this.matches.length, Math.ceil((scrollTop + clientHeight) / this.height) + 5);
    if (!always && first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    const drawn = this.matches.slice(first, last).map((index, offset) => {
      const row = this.makeRow(index);
      const place = first + offset;
      row.id = `row-${place}`;
      row.dataset.place = place;
      row.setAttribute("aria-selected", place === this.selected);
      row.setAttribute("aria-setsize", this.matches.length);
      row.setAttribute("aria-posinset", place + 1);
      return row;
    });
    this.rows.replaceChildren(...drawn);
    const height = drawn[0]?.getBoundingClientRect().height;
    if (height && Math.abs(height - this.height) > 0.01) {
      // Another font size than thought of, or the first row ever.
      this.height = height;
      this.draw(true);
      return;
    }
    this.rows.style.paddingTop = `${first * this.height}px`;
    if (this.selected >= first && this.selected < last) {
      this.box.setAttribute("aria-activedescendant", `row-${this.selected}`);
    } else {
      this.box.removeAttribute("aria-activedescendant");
    }
  }
}
