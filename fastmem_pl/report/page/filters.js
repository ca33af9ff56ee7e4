/**
 * What the filters select: pure functions of the embedded data.
 *
 * @typedef {{label: string, baselines: (number | null)[], memory: boolean}} Variant
 *   a method of a run; baselines: numbers of the zero-shot variants that it is compared with, by dataset
 * @typedef {{label: string, percent: boolean, binary: boolean, lower: boolean}} Score
 *   lower: lower is better
 * @typedef {{v: number, text: string, scores: Record<string, number | null>, status: string, cut: number,
 *   words: number | null, seconds: number | null}} Answer
 *   v: number of the variant; status: "ok", or why there is no memory; cut: context tokens over the limit
 * @typedef {{id: string, dataset: number, question: string,
 *   context: [string, "" | "answer" | "original"][] | null, prompt: string | null,
 *   references: string[], originals: string[], measures: string[], answers: Answer[]}} Sample
 *   measures: what models make of the context
 * @typedef {{variants: Variant[], scores: Record<string, Score>, primary: Record<string, string>,
 *   datasets: string[], samples: Sample[]}} Data
 */

/** Names of the states, in the order of their bits; "all" is bit 0. */
const STATES = ["all", "fixed", "broken", "differ", "format", "original", "failed", "cut"];

/** By how much a score that is not just right or wrong must change to count as fixed or broken. */
const STEP = 0.05;

class Browser {
  /** @param {Data} data */
  constructor(data) {
    Object.assign(this, data);
    this.binary = Object.keys(data.scores).filter((name) => data.scores[name].binary);
    this.texts = new Array(data.samples.length);
    this.keys = sampleKeys(data);
    this.differing = data.samples.map(({ answers }) => differ(answers));
    // The variants that answered samples of each dataset, in their order.
    this.answering = data.datasets.map(() => new Set());
    for (const { dataset, answers } of data.samples) {
      for (const { v } of answers) this.answering[dataset].add(v);
    }
    this.answering = this.answering.map((numbers) => [...numbers].sort((a, b) => a - b));
  }

  /** The score that fixed and broken go by: the chosen one, or the primary one of the sample's dataset. */
  scoreOf(sample, chosen) {
    return chosen || this.primary[this.datasets[sample.dataset]] || this.binary[0] || null;
  }

  /** @returns {number | null} 1 where a is better than b by the score, -1 where worse, else 0 or null */
  change(a, b, name) {
    const after = a?.scores[name];
    const before = b?.scores[name];
    const score = this.scores[name];
    if (after == null || before == null || !score) return null;
    const gain = (after - before) * (score.lower ? -1 : 1);
    // Scores are rounded sums: 0.55 - 0.5 is a little more than 0.05.
    const step = (score.binary ? 0.5 : STEP) + 1e-9;
    return gain > step ? 1 : gain < -step ? -1 : 0;
  }

  /** The change of a variant's answer to that of the variant that it is compared with. */
  changeOf(sample, variant, name) {
    const baseline = this.variants[variant]?.baselines[sample.dataset] ?? null;
    if (baseline === null) return null;
    return this.change(answerOf(sample, variant), answerOf(sample, baseline), name);
  }

  /** The states of all samples, a bit each, for a method and a score. */
  bits(variant, chosenScore) {
    return Uint8Array.from(this.samples, (sample, index) => {
      const answer = answerOf(sample, variant);
      const change = this.changeOf(sample, variant, this.scoreOf(sample, chosenScore));
      const states = [
        true,
        change > 0,
        change < 0,
        this.differing[index],
        answer?.scores.format_failure > 0.5,
        answer?.scores.original > 0.5,
        answer !== undefined && answer.status !== "ok",
        sample.answers.some(({ cut }) => cut > 0),
      ];
      return states.reduce((bits, state, bit) => bits | (state << bit), 0);
    });
  }

  /** What the search looks at; made once a sample. */
  text(index) {
    return (this.texts[index] ??= searched(this.samples[index]));
  }

  /**
   * The numbers of the samples that pass, and how many there would be in each state.
   *
   * @param {{terms: string[], dataset: number | null, state: string}} filter
   * @param {Uint8Array} bits of {@link bits}
   */
  select({ terms, dataset, state }, bits) {
    const wanted = 1 << STATES.indexOf(state);
    const counts = new Array(STATES.length).fill(0);
    const matches = [];
    for (let index = 0; index < this.samples.length; index++) {
      if (dataset !== null && this.samples[index].dataset !== dataset) continue;
      if (terms.length && !terms.every((term) => this.text(index).includes(term))) continue;
      for (let bit = 0; bit < counts.length; bit++) counts[bit] += (bits[index] >> bit) & 1;
      if (bits[index] & wanted) matches.push(index);
    }
    return { matches, counts };
  }
}

/** @returns {Answer | undefined} */
function answerOf(sample, variant) {
  return sample.answers.find(({ v }) => v === variant);
}

/** The words of a query, in lower case; quotes keep words together. */
function termsOf(query) {
  const found = query.toLowerCase().matchAll(/["“”]([^"“”]+)["“”]?|[^\s"“”]+/g);
  return [...found].map(([word, quoted]) => (quoted ?? word).trim()).filter(Boolean);
}

function searched(sample) {
  const context = (sample.context ?? []).map(([text]) => text).join("");
  const answers = sample.answers.map(({ text }) => text);
  return [sample.id, sample.question, ...sample.references, ...answers, context].join("\n").toLowerCase();
}

/** Whether two answers differ in more than case, punctuation and spaces. */
function differ(answers) {
  return answers.some(({ text }) => text !== answers[0].text && plain(text) !== plain(answers[0].text));
}

function plain(text) {
  return text.toLowerCase().replace(/[\p{P}\p{S}\s]+/gu, " ").trim();
}

/** A name for each sample in the page's address; ids may be used twice. */
function sampleKeys({ samples, datasets }) {
  const used = new Map();
  return samples.map(({ id, dataset }) => {
    const key = datasets.length > 1 ? `${datasets[dataset]}/${id}` : String(id);
    used.set(key, (used.get(key) ?? 0) + 1);
    return used.get(key) > 1 ? `${key}~${used.get(key)}` : key;
  });
}
