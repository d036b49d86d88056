// What was found in words, the tables of metrics, and the notes.

function startSummary() {
  const first = data.methods[0];
  const swept = data.methods.find((method) => method.kind === "threshold");
  const [small, large] = Object.values(data.references);
  const recovering = (method) => tile(`Cost to recover 80\u00a0% of the gap, ${method.name}`, percent(method.cpt_80[0]),
    known(method.cpt_80[0]) ? `${range(method.cpt_80)} of always-large's cost; less is better` : "there is no gap, or it is not recovered");
  byId("summary").append(
    el("dl", { class: "tiles" },
      tile("Accuracy, small model alone", percent(small.accuracy[0]), range(small.accuracy)),
      tile("Accuracy, large model alone", percent(large.accuracy[0]), range(large.accuracy)),
      recovering(first),
      swept && swept !== first && recovering(swept),
    ),
    el("ul", { class: "sentences" }, data.sentences.map((sentence) => el("li", {}, tidy(sentence)))),
  );
}
const range = ([value, low, high]) => (known(value) ? `[${bare(low, percent)}, ${bare(high, percent)}]` : "");

function startTables() {
  const { headline, all, points, notes, field, field_note } = data.tables;
  const names = data.methods.map((method) => method.name);
  const select = el("select", {}, names.map((name) => el("option", {}, name)));
  const place = el("div", {});
  const show = () => place.replaceChildren(table(points[select.value]));
  select.addEventListener("change", show);
  show();
  const paired = data.at_lam.map((row) => [
    `${row.method}, λ=${Number(row.lam.toPrecision(3))}`,
    decimal(row.threshold, 3),
    interval(row.difference, (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(4)}`),
    known(row.holm) ? (row.holm < 0.001 ? "< 0.001" : row.holm.toFixed(3)) : "undefined",
  ]);
  byId("metric-tables").append(
    table(headline.map((row, i) => row.map((text, k) => (i === 0 && k === 0 ? "Method" : text.replace("\n", " ")))), { class: "wide" }),
    el("p", { class: "note" }, notes.join(" "), " CPT: cost at which the curve recovers that share of the gap. acc @: accuracy at that cost."),
    field.length > 0 ? el("details", { open: "" }, el("summary", {}, "The field: query-level routers and cascades beside the routers of steps"),
      table(field, { class: "wide" }), el("p", { class: "note" }, field_note)) : "",
    paired.length > 0 ? el("details", {}, el("summary", {}, "Return against the best threshold for the same λ, paired on problems"),
      table([["Router", "Threshold", "Difference", "p (Holm)"], ...paired])) : "",
    el("details", {}, el("summary", {}, "All metrics"), flipped(all)),
    el("details", {}, el("summary", {}, "Operating points"), el("p", { class: "controls" }, el("label", {}, "Method ", select)), place),
  );
}

/** A table of one card or row for each metric: a column for each method gets too wide. */
const flipped = (rows) => table(rows.map((row, i) => (i ? row : ["Metric", ...row.slice(1)])), { class: "wide" });

function startNotes() {
  const { subject, sampling } = data;
  const items = [
    ["What was evaluated", `The split ${subject.split} of the rollouts ${subject.rollouts} (hash ${subject.hash}): ${plural(subject.problems, "problem")} in ${plural(subject.trees, "tree")}.` +
      (subject.left_out_trees ? ` ${plural(subject.left_out_trees, "tree")} of the store ${subject.left_out_trees === 1 ? "is" : "are"} left out, because a score is missing.` : "") +
      (subject.transfer ? " At least one router may have been trained on other rollouts (--transfer)." : "")],
    ["Cost", `The cost model is ${subject.cost}. In the browser of problems the cost is the tokens that the large model decoded, also as a share of what always-large decodes in the same tree.`],
    ["Caps", subject.caps ? `Every router but always-large: ${subject.caps} per problem.` : "None."],
    ["Intervals", `95 % percentile bootstrap over problems, ${whole(subject.resamples)} resamples, seed ${subject.seed}. They cover the draw of problems, not the training of the routers. Replicas of a problem are resampled together.`],
    ["Solutions shown", `${plural(sampling.shown, "problem")} of ${whole(subject.problems)}, drawn at random (not picked), the first replica of each: what shares of them are wrong or rescued is an estimate of the whole. ` +
      (sampling.shown < sampling.wanted ? `${whole(sampling.wanted)} were drawn; the rest is left out to keep the traces below ${sampling.megabytes} MB. ` : "") +
      "At most 6 settings of a method are shown step by step, and none of a method that draws its actions (random)."],
    ...Object.entries(data.flags).map(([name, text]) => [FLAG_NAMES[name], text]),
    ["Made by", `trim-routing ${subject.version}, ${subject.date}. This file is complete: it loads nothing.`],
  ];
  byId("note-text").append(el("dl", { class: "notes" }, items.map(([term, text]) => [el("dt", {}, term), el("dd", {}, text)])));
}
