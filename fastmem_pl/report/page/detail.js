/** One sample: what was asked, all answers, context and prompt. */

function formatScore(value, { percent }) {
  return percent ? `${(100 * value).toFixed(1)}%` : value.toFixed(2);
}

/** A score in words and a sign: [class, text]; what a binary score calls right depends on its direction. */
function scoreMark(value, score) {
  if (!score.binary) return ["", `${score.label} ${formatScore(value, score)}`];
  const yes = value > 0.5;
  if (!score.lower) return yes ? ["good", `✓ ${score.label}`] : ["bad", `✗ ${score.label}`];
  return yes ? ["bad", `! ${score.label}`] : ["quiet", `no ${score.label}`];
}

/** The shortest form of a score, for the list: [class, sign, words for those who do not see it]. */
function shortMark(answer, score, name) {
  if (!answer) return ["quiet", "–", "no answer"];
  const value = answer.scores[name];
  if (value == null || !score) return ["quiet", "·", "not scored"];
  if (!score.binary) return ["", formatScore(value, score).replace("%", ""), formatScore(value, score)];
  const right = value > 0.5 !== score.lower;
  return right ? ["good", "✓", "right"] : ["bad", "✗", "wrong"];
}

const CHANGES = { 1: ["fixed", "fixed"], "-1": ["broken", "broken"] };

/** Say on a row or a card whether its answer was fixed or broken. */
function markChange(node, change) {
  const [className, text] = CHANGES[change] ?? ["", ""];
  node.className = `change ${className}`;
  node.textContent = text;
}

/** What stands for a sample in the list. */
function titleOf(sample) {
  const start = () => (sample.context ?? []).map(([text]) => text).join("").slice(0, 160);
  return sample.question?.trim() || start().trim() || `Sample ${sample.id}`;
}

/**
 * Show a sample.
 *
 * @param {Browser} browser
 * @param {Sample} sample
 * @param {{method: number, score: string, terms: string[]}} view chosen method and score, searched words
 */
function showSample(browser, sample, { method, score: chosen, terms }) {
  const { datasets, scores } = browser;
  byId("question").textContent = sample.question?.trim() || `Sample ${sample.id}`;
  const cut = Math.max(0, ...sample.answers.map((answer) => answer.cut ?? 0));
  const name = browser.scoreOf(sample, chosen);
  const tags = [
    datasets[sample.dataset],
    `id ${sample.id}`,
    ...sample.measures,
    name && scores[name] ? `compared by ${scores[name].label}` : "",
  ].filter(Boolean);
  byId("tags").replaceChildren(...tags.map((text) => element("li", "", text)));
  if (cut) byId("tags").append(element("li", "warn", `context cut off by ${count(cut)} tokens`));
  showExpected(sample);
  const cards = sample.answers.map((answer) => makeCard(browser, { sample, answer, score: name, method }));
  byId("cards").replaceChildren(...cards);
  showContext(sample);
  byId("prompt").hidden = sample.prompt == null;
  byId("prompt-text").textContent = sample.prompt ?? "";
  byId("prompt-size").textContent = `${count((sample.prompt ?? "").length)} characters`;
  markTerms(terms);
}

/** What was expected, and what the context contradicts. */
function showExpected({ references, originals }) {
  const groups = [
    ["Expected", "answer", references],
    ["Original", "original", originals],
  ].filter(([, , texts]) => texts.length);
  const lines = groups.map(([name, kind, texts]) => {
    const line = element("div");
    const value = element("dd");
    texts.forEach((text) => value.append(element("span", kind, text), " "));
    line.append(element("dt", "", name), value);
    return line;
  });
  byId("expected").replaceChildren(...lines);
}

/** An answer beside the others. */
function makeCard(browser, { sample, answer, score: name, method }) {
  const { variants, scores } = browser;
  const card = fromTemplate("card");
  card.classList.toggle("chosen", answer.v === method);
  card.querySelector("h5").textContent = variants[answer.v].label;
  markChange(card.querySelector(".change"), browser.changeOf(sample, answer.v, name));
  const text = card.querySelector(".text");
  text.textContent = answer.text.trim() || "(empty)";
  text.classList.toggle("quiet", !answer.text.trim());
  const status = card.querySelector(".status");
  status.hidden = answer.status === "ok";
  status.textContent = `not memorized: ${answer.status}`;
  const marks = Object.entries(scores).filter(([key]) => answer.scores[key] != null);
  card.querySelector(".marks").append(
    ...marks.map(([key, score]) => element("li", ...scoreMark(answer.scores[key], score))),
  );
  const effort = [];
  if (answer.words != null) effort.push(`${answer.words} word${answer.words === 1 ? "" : "s"}`);
  if (answer.seconds != null) effort.push(`${answer.seconds.toFixed(2)} s`);
  card.querySelector(".effort").textContent = effort.join(" · ");
  return card;
}

/** The context with its answers marked, the first of them in sight. */
function showContext({ context }) {
  const box = byId("context");
  const segments = context ?? [];
  byId("legend-answer").hidden = !segments.some(([, kind]) => kind === "answer");
  byId("legend-original").hidden = !segments.some(([, kind]) => kind === "original");
  box.classList.toggle("quiet", context === null);
  if (context === null) {
    box.textContent = "The data file with the context was not at hand: fastmem report takes it as --data.";
    return;
  }
  box.replaceChildren(
    ...segments.map(([text, kind]) =>
      kind === "answer" || kind === "original" ? element("mark", kind, text) : document.createTextNode(text),
    ),
  );
  const first = box.querySelector("mark");
  box.scrollTop = first ? Math.max(0, first.offsetTop - box.offsetTop - box.clientHeight / 3) : 0;
}

/** Paint the words that were searched for; without effect on the document, and where browsers can. */
function markTerms(terms) {
  if (!globalThis.Highlight || !CSS.highlights) return;
  CSS.highlights.delete("search");
  if (!terms.length) return;
  const ranges = [];
  const walker = document.createTreeWalker(byId("detail"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode() && ranges.length < 500) {
    const text = walker.currentNode.data.toLowerCase();
    if (text.length !== walker.currentNode.length) continue;
    for (const term of terms) {
      for (let at = text.indexOf(term); at >= 0; at = text.indexOf(term, at + term.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + term.length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("search", new Highlight(...ranges));
}
