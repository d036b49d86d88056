// Solved problems: a list to choose from, and the chosen one step by step.
const FLAG_NAMES = { wrong: "Wrong", rescued: "Rescued", wasted: "Wasted escalations", spoiled: "Spoiled" };

const share = (tokens, all) => (all > 0 ? percent(tokens / all, 0) : tokens > 0 ? "more than none" : "0 %");

/** What a run is beside wrong. */
const flagsOf = (run) => run.flags.filter((name) => name !== "wrong")
  .map((name) => el("span", { class: `flag ${name}` }, FLAG_NAMES[name].toLowerCase()));
const shareOf = (run, problem) => share(run.large_tokens, problem.large.large_tokens);

/** The steps of a run: what was accepted, by whom, and what was rejected. */
function stepsOf(problem, run) {
  const steps = [];
  let at = 0;
  for (const action of run.actions) {
    const [small, large] = problem.nodes[at];
    const escalated = action === "1";
    const byLarge = escalated || (action === "3" && large.tokens > 0); // 3: one model alone writes the answer
    const accepted = byLarge ? large : small;
    steps.push({ accepted, author: byLarge ? LARGE : SMALL, escalated, rejected: escalated ? small : null, cut: action === "2" });
    at = accepted.next;
  }
  return steps;
}

function startBrowser() {
  const list = byId("problem-list");
  const detail = byId("problem-detail");
  const search = byId("problem-search");
  const all = data.problems.map((problem, i) => i);
  // It opens with a problem that shows something; the list itself is as it was drawn.
  const first = data.problems.findIndex((problem) => problem.runs[chosen.index].flags.includes("rescued"));
  const state = { filter: "all", found: all, now: Math.max(first, 0) };
  settingSelects(byId("problem-method"), byId("problem-setting"));
  const order = byId("problem-order");
  const beside = byId("problem-other");
  beside.append(el("option", { value: "" }, "no other"), ...data.settings.map((each, i) => el("option", { value: i }, `${each.method}, ${each.label}`)));
  const runOf = (problem) => problem.runs[chosen.index];
  const otherOf = (problem) => (beside.value === "" ? null : problem.runs[beside.value]);
  /** The first step at which two runs of a problem go apart; -1 where they never do. */
  const apart = (run, other) => (run.actions === other.actions ? -1 : [...run.actions].findIndex((action, i) => action !== other.actions[i]));
  const differs = (problem) => otherOf(problem) !== null && apart(runOf(problem), otherOf(problem)) >= 0;
  const orders = { // what comes first has the least
    cost: (problem) => -runOf(problem).large_tokens,
    wrong: (problem) => Number(runOf(problem).right),
    apart: (problem) => (differs(problem) ? Number(runOf(problem).right === otherOf(problem).right) : 2),
  };
  const textOf = data.problems.map((problem) =>
    [problem.id, problem.question, ...problem.nodes.flat().map((each) => each?.text ?? "")].join("\n").toLowerCase());

  const filters = ["all", ...Object.keys(FLAG_NAMES)].map((name) => {
    const count = el("span", { class: "count" });
    const button = el("button", { type: "button", "data-filter": name, "aria-pressed": "false", title: data.flags[name] ?? "" },
      name === "all" ? "All" : FLAG_NAMES[name], " ", count);
    button.addEventListener("click", () => {
      state.filter = name;
      refresh();
    });
    return { name, button, count };
  });
  byId("problem-filters").append(...filters.map((each) => each.button));

  const holds = (problem, name) => name === "all" || runOf(problem).flags.includes(name);

  function refresh() {
    const kept = state.found[state.now];
    const words = search.value.toLowerCase().trim();
    const searched = all.filter((i) => textOf[i].includes(words));
    state.found = searched.filter((i) => holds(data.problems[i], state.filter));
    const place = orders[order.value];
    if (place) state.found.sort((one, other) => place(data.problems[one]) - place(data.problems[other]));
    state.now = Math.max(state.found.indexOf(kept), 0);
    for (const { name, button, count } of filters) {
      count.textContent = String(searched.filter((i) => holds(data.problems[i], name)).length);
      button.setAttribute("aria-pressed", String(name === state.filter));
    }
    list.replaceChildren(...state.found.map((i, place) => option(data.problems[i], place)));
    const { trees } = data.subject;
    const count = chosen.setting.counts[state.filter];
    byId("problem-count").textContent = `${plural(state.found.length, "problem")} of ${data.problems.length} shown.` +
      (state.filter === "all" ? "" :
        ` In all ${plural(trees, "solution")} of the split: ${whole(count)} (${percent(count / trees)}). ${data.flags[state.filter]}`);
    show();
  }

  function option(problem, place) {
    const run = runOf(problem);
    const flags = flagsOf(run);
    const item = el("div", { role: "option", id: `option-${place}`, "aria-selected": "false", "data-id": problem.id },
      el("span", { class: "line" }, rightOrWrong(run.right), el("b", { dir: "auto" }, problem.id),
        el("span", { class: "cost" }, shareOf(run, problem))),
      el("span", { class: "question", dir: "auto" }, withMaths(problem.question.slice(0, 160))),
      flags.length > 0 && el("span", { class: "flags" }, flags));
    item.addEventListener("click", () => choose(place));
    return item;
  }

  function choose(place) {
    if (!state.found.length) return;
    state.now = clamp(place, 0, state.found.length - 1);
    show();
  }

  function show() {
    for (const item of list.children) item.setAttribute("aria-selected", "false");
    const item = list.children[state.now];
    if (!item) {
      list.removeAttribute("aria-activedescendant");
      detail.replaceChildren(el("p", { class: "empty" }, data.problems.length ? "No problem is of this kind. Choose another filter or empty the search." : "This page shows no solutions."));
      return;
    }
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
    const bottom = item.offsetTop + item.offsetHeight;
    if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
    showProblem(data.problems[state.found[state.now]]);
  }

  /** What a router did with a problem; from step `parting` on it differs from the other that is shown. */
  function runItem(problem, index, parting) {
    const run = problem.runs[index];
    const steps = stepsOf(problem, run);
    const escalations = steps.filter((step) => step.escalated).length;
    const { method, label } = data.settings[index];
    return el("div", { class: "run" },
      el("dl", { class: "facts" },
        fact(`${method}, ${label}`, rightOrWrong(run.right), flagsOf(run).map((flag) => [" ", flag])),
        fact("Cost", `${plural(run.large_tokens, "large token")}, `, pair(`${shareOf(run, problem)} of always-large's ${whole(problem.large.large_tokens)}`)),
        fact("Escalations", `${escalations} of ${plural(steps.length, "step")}`),
        fact("In the same tree", pair("always-small ", rightOrWrong(problem.small.right)), " ", pair("always-large ", rightOrWrong(problem.large.right)))),
      strip(steps),
      el("p", { class: "strip-key", "aria-hidden": "true" }, "Height: the score of each step. S: small model, L: large model."),
      el("ol", { class: "steps" }, steps.map((step, i) => [
        i === parting && el("li", { class: "parting" }, "From here on the two differ."),
        stepItem(step, i + 1),
      ])),
      el("p", { class: "end" }, rightOrWrong(run.right), ` It ends because ${STOPS[steps.at(-1).accepted.stop] ?? "of an unknown reason"}.`),
    );
  }

  function showProblem(problem) {
    const move = (by, text, label) => el("button", { type: "button", "aria-label": label, disabled: state.now + by < 0 || state.now + by >= state.found.length,
      onclick: () => {
        choose(state.now + by);
        (detail.querySelector(`[aria-label="${label}"]:not([disabled])`) ?? detail).focus({ preventScroll: true });
      } }, text);
    const other = otherOf(problem);
    const parting = other && apart(runOf(problem), other);
    detail.replaceChildren(
      el("div", { class: "moves" }, move(-1, "← Previous", "Previous problem (k)"), el("span", {}, `${state.now + 1} of ${state.found.length}`), move(1, "Next →", "Next problem (j)")),
      el("h3", { dir: "auto" }, problem.id, problem.replica > 0 && el("small", {}, ` replica ${problem.replica}`)),
      el("p", { class: "text question", dir: "auto" }, withMaths(problem.question)),
      ...(known(problem.answer) ? [el("p", { class: "answer" }, "Reference answer: ", el("bdi", {}, withMaths(problem.answer)))] : []),
      ...(parting === -1 ? [el("p", { class: "note" }, "Both do the same here.")] : []),
      el("div", { class: other ? "runs both" : "runs" }, runItem(problem, chosen.index, parting), other && runItem(problem, Number(beside.value), parting)),
    );
  }

  list.addEventListener("keydown", (event) => {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(state.now + moves[event.key]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "j" || event.key === "k") choose(state.now + (event.key === "j" ? 1 : -1));
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    }
  });
  search.addEventListener("input", refresh);
  order.addEventListener("change", refresh);
  beside.addEventListener("change", refresh);
  chosen.listeners.push(refresh);
  refresh();
}
