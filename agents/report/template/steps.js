// Steps as cards: who wrote them, their scores, and what was rejected.
const STOPS = {
  boxed: "the answer is in a box", eos: "the model stopped by itself", length: "a limit on tokens was reached",
  context: "no room was left in a window", max_steps: "the last step allowed", failed: "the generation failed",
};
const SMALL = { name: "small model", letter: "S", className: "small" };
const LARGE = { name: "large model", letter: "L", className: "large" };

const rightOrWrong = (right) => el("span", { class: right ? "verdict right" : "verdict wrong" }, right ? "✓ right" : "✗ wrong");
const pair = (...parts) => el("span", { class: "pair" }, parts);
const fact = (term, ...parts) => el("div", {}, el("dt", {}, term), el("dd", {}, parts));

function meter(score) {
  if (!known(score)) return null;
  const level = score >= 0.7 ? "high" : score >= 0.3 ? "middle" : "low";
  const fill_ = el("span", {});
  fill_.style.width = `${100 * clamp(score, 0, 1)}%`;
  return el("span", { class: `meter ${level}` }, el("span", { class: "sr" }, "score "), el("span", { class: "track", "aria-hidden": "true" }, fill_), score.toFixed(2));
}

const facts = (proposal) => [
  meter(proposal.score),
  el("span", { class: "tokens" }, plural(proposal.tokens, "token")),
  known(proposal.label) &&
    el("span", { class: proposal.label ? "label right" : "label wrong", title: "by exact labels of steps" }, proposal.label ? "✓ step right" : "✗ step wrong"),
];

function stepItem(step, number) {
  const { accepted, author, rejected } = step;
  return el("li", { class: `step ${author.className}` },
    el("div", { class: "head" },
      el("span", { class: "author" }, el("b", { "aria-hidden": "true" }, author.letter), `${number}. ${author.name}`),
      facts(accepted), step.aside),
    el("div", { class: "text", dir: "auto" }, withMaths(accepted.text || "(nothing)")),
    rejected && el("details", { class: "rejected", open: true },
      el("summary", {}, "✗ rejected: the small model's proposal", rejected.text === accepted.text && " (the same text)"),
      el("div", { class: "head" }, facts(rejected)),
      el("del", { dir: "auto", class: "text" }, withMaths(rejected.text || "(nothing)"))),
    step.cut && el("p", { class: "cut" }, "The large model was called and cut off by the cap on its tokens; this proposal stands."),
    step.note && el("p", { class: "cut" }, step.note),
  );
}

/** A strip with one block for each step: who wrote it and its score; those without one are pale and half as high. */
function strip(steps) {
  return el("div", { class: "strip", "aria-hidden": "true" }, steps.map(({ accepted, author }) => {
    const bar = el("i", {});
    bar.style.height = `${Math.round(100 * clamp(accepted.score ?? 0.5, 0.04, 1))}%`;
    bar.classList.toggle("unscored", !known(accepted.score));
    return el("span", { class: author.className }, bar, author.letter);
  }));
}
