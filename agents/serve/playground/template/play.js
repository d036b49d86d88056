// One problem, solved before one's eyes: what the service streams to any client, drawn with the report's cards.
const HERE = [["router", "The router"], ["large", "Always-large"]];
const ENDED = { ...STOPS, time: "time was up", cap: "a cap of the policy was reached" };
const answers = new Map(data.problems);
const tally = { problems: 0, router: { right: 0, tokens: 0 }, large: { right: 0, tokens: 0 } };
let card = null;
let running = null; // what stops the requests under way
startTheme();

const headers = () => ({ "Content-Type": "application/json", ...(byId("key").value && { Authorization: `Bearer ${byId("key").value}` }) });

function say(text, wrong = false) {
  byId("said").textContent = text;
  byId("said").className = wrong ? "wrong" : "";
}

/** Asks the service; an error is one in words. */
async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    byId("key-box").hidden = false;
    throw new Error(byId("key").value ? "The service does not accept this key." : "The service asks for a key: enter it above.");
  }
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The service answered with status ${answer.status}.`);
}

async function introduce() {
  card = (await (await ask("/v1/models")).json()).data[0];
  const { trim } = card;
  const names = [`router ${card.id}`, [trim.small, trim.large].filter(known).join(" and "), known(trim.scorer) && `scores by ${trim.scorer}`, trim.asks && `asks for ${trim.asks.join(" and ")} where that pays`];
  byId("subject").replaceChildren(...names.filter(Boolean).map((text) => el("span", {}, text)));
  byId("budget-box").hidden = !trim.budget_range;
  if (!trim.budget_range) return;
  const low = Math.ceil(trim.budget_range[0] * 100) / 100;
  const high = Math.max(low, ...(trim.held_out ?? []).map((row) => Math.ceil(row.share * 100) / 100));
  Object.assign(byId("budget"), { min: low, max: high > low ? high : 1 });
  byId("budget").value = Math.max(low, 0.25);
  showBudget();
}

/** Reads what held-out problems say of a budget, by straight lines between the settings that were tried. */
function expected(budget) {
  const rows = (card.trim.held_out ?? []).filter((row) => known(row.share) && known(row.accuracy)).sort((a, b) => a.share - b.share);
  const above = rows.findIndex((row) => row.share >= budget);
  if (above < 1) return rows.at(above)?.accuracy;
  const [a, b] = [rows[above - 1], rows[above]];
  return a.accuracy + ((b.accuracy - a.accuracy) * (budget - a.share)) / (b.share - a.share);
}

function showBudget() {
  const budget = Number(byId("budget").value);
  const words = tidy(`${percent(budget, 0)} of always-large's tokens`);
  byId("budget-is").textContent = words;
  byId("budget").setAttribute("aria-valuetext", words);
  const accuracy = expected(budget);
  const { always_small_accuracy: small, always_large_accuracy: large } = card.trim.held_out?.[0] ?? {};
  const others = known(small) && known(large) ? ` (the small model alone ${percent(small, 0)}, the large ${percent(large, 0)})` : "";
  byId("expected").textContent = known(accuracy) ? tidy(`About ${percent(accuracy, 0)} right on held-out problems${others}`) : "";
}

function showChecked() {
  const answer = answers.get(byId("problem").value.trim());
  byId("checked").textContent = known(answer) ? "Its answer is known, so solutions are checked." : "The answer is not known here: nothing is checked.";
}

function drawProblem() {
  const others = data.problems.map(([question]) => question).filter((question) => question !== byId("problem").value);
  byId("problem").value = others[Math.floor(Math.random() * others.length)];
  showChecked();
}

/** The values of a stream's events. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Error("The answer broke off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

/** One solution under way: its own column of the page. */
class Side {
  constructor(key, title, question) {
    Object.assign(this, { key, steps: [], tokens: 0, all: 0, thrown: 0, answer: null, right: null, done: false });
    this.truth = answers.get(question);
    this.parts = { tiles: el("dl", { class: "tiles" }), strip: el("div", {}), list: el("ol", { class: "steps" }), end: el("p", { class: "end" }) };
    this.box = el("section", { class: "side", id: `side-${key}`, "aria-label": title }, el("h2", {}, title), Object.values(this.parts));
  }

  async run(question, signal) {
    const body = { messages: [{ role: "user", content: question }], stream: true, trace: true };
    if (this.key === "large") body.only = "large";
    else if (card.trim.budget_range) body.budget = Number(byId("budget").value);
    const answer = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const { error, choices, trim } of events(answer)) {
      if (error) throw new Error(error.message);
      if (trim?.author) this.take(choices[0].delta.content ?? choices[0].delta.reasoning_content ?? "", trim);
      else if (trim) this.finish(trim);
      compare();
    }
    if (!this.done) throw new Error("The answer broke off.");
  }

  take(text, trim) {
    trim.late_scores.forEach((score, i) => {
      const place = this.steps.length - trim.late_scores.length + i;
      this.steps[place].accepted.score = score;
      this.parts.list.children[place].replaceWith(stepItem(this.steps[place], place + 1));
    });
    const large = trim.author === "large";
    const step = {
      accepted: { text: text.trim(), score: large ? trim.large_score : trim.score, tokens: large ? trim.large_tokens : trim.tokens },
      author: large ? LARGE : SMALL,
      rejected: known(trim.rejected) ? { text: trim.rejected.trim(), score: trim.score, tokens: trim.tokens } : null,
      note: trim.fallback,
      aside: [trim.thinking && "thinking", trim.asked && el("span", { class: "asked" }, tidy(`? asked: ${plural(trim.asked_tokens, "token")} read`))],
      asked: trim.asked_tokens,
    };
    this.steps.push(step);
    this.tokens += trim.large_tokens ?? 0;
    this.all += step.accepted.tokens;
    this.thrown += step.rejected?.tokens ?? 0;
    this.parts.list.append(stepItem(step, this.steps.length));
    this.parts.strip.replaceChildren(strip(this.steps));
  }

  finish(trim) {
    this.done = true;
    this.answer = trim.answer;
    this.parts.end.textContent = `It ends because ${ENDED[trim.ended] ?? "of an unknown reason"}.`;
    if (known(this.truth)) this.right = this.answer?.trim() === this.truth;
  }

  fail(error) {
    const stopped = error.name === "AbortError";
    this.parts.end.textContent = stopped ? "Stopped here; the models are not asked for more." : error.message;
    this.parts.end.className = stopped ? "end" : "end wrong";
    return stopped ? null : error.message;
  }

  show(other) {
    const checked = this.right === null ? "" : [rightOrWrong(this.right), this.right ? "" : `: it is ${this.truth}`];
    const answer = !this.done ? "…" : known(this.answer) ? el("bdi", {}, this.answer) : "none";
    const tiles = [
      tile("Answer", answer, checked),
      tile("Large tokens", whole(this.tokens), `of ${whole(this.all)} in all`),
    ];
    const usual = other ? other.tokens : this.all;
    const ended = this.done && (!other || other.done) && usual > 0;
    const saved = 1 - this.tokens / usual;
    const against = other ? `against ${whole(usual)}` : "if large wrote as much";
    const large = this.steps.filter((step) => step.author === LARGE).length;
    if (this.key === "router") {
      tiles.push(tile("Saved", ended ? percent(saved, 0) : "…", against, ended ? (saved < 0 ? "dear" : "saved") : ""));
      tiles.push(tile("Large steps", `${large} of ${this.steps.length}`, `${plural(this.thrown, "small token")} wasted`));
      const asked = this.steps.filter((step) => known(step.asked));
      if (card.trim.asks) tiles.push(tile("Asked", `${asked.length} of ${this.steps.length}`, `${plural(asked.reduce((sum, step) => sum + step.asked, 0), "token")} read`));
    } else tiles.push(tile("Steps", whole(this.steps.length), "all by the large model"));
    this.parts.tiles.replaceChildren(...tiles);
  }
}

let sides = [];
function compare() {
  for (const side of sides) side.show(sides.find((other) => other.key === "large" && other !== side));
}

/** Says in a sentence how it went, and keeps count where both have solved a problem whose answer is known. */
function conclude() {
  const [router, large] = sides;
  const verdict = (side) => (side.right === null ? "" : side.right ? " (right)" : " (wrong)");
  const told = (side, title) => `${title}: ${side.answer ?? "no answer"}${verdict(side)} with ${plural(side.tokens, "large-model token")}.`;
  say(sides.map((side, i) => told(side, HERE[i][1])).join(" "));
  if (!large || router.right === null) return;
  tally.problems += 1;
  for (const side of sides) {
    tally[side.key].right += side.right;
    tally[side.key].tokens += side.tokens;
  }
  const sum = ({ right, tokens }) => `${right} right with ${plural(tokens, "large-model token")}`;
  byId("tally").textContent = `So far, ${plural(tally.problems, "problem")} with a known answer: the router ${sum(tally.router)}, always-large ${sum(tally.large)}.`;
}

async function solve() {
  const question = byId("problem").value.trim();
  if (running || !question) return;
  const stopper = new AbortController();
  running = stopper;
  const by = document.activeElement; // a button that is switched off loses the focus
  for (const id of ["solve", "draw", "both", "budget"]) byId(id).disabled = true;
  byId("stop").disabled = false;
  if (by === byId("solve")) byId("stop").focus({ preventScroll: true });
  say("Solving …");
  try {
    if (!card) await introduce();
    sides = HERE.slice(0, byId("both").checked ? 2 : 1).map(([key, title]) => new Side(key, title, question));
    byId("sides").replaceChildren(...sides.map((side) => side.box));
    compare();
    const faults = (await Promise.all(sides.map((side) => side.run(question, stopper.signal).then(() => null, (error) => side.fail(error))))).filter(known);
    if (sides.every((side) => !side.steps.length)) byId("sides").replaceChildren();
    if (stopper.signal.aborted) say("Stopped.");
    else if (faults.length) say([...new Set(faults)].join(" "), true);
    else conclude();
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    for (const id of ["solve", "draw", "both", "budget"]) byId(id).disabled = false;
    if (document.activeElement === byId("stop")) byId("solve").focus({ preventScroll: true });
    byId("stop").disabled = true;
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  solve();
});
byId("problem").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
byId("stop").addEventListener("click", () => running?.abort());
byId("draw").addEventListener("click", drawProblem);
byId("problem").addEventListener("input", showChecked);
byId("budget").addEventListener("input", showBudget);
byId("key").addEventListener("change", () => introduce().then(() => say(""), (error) => say(error.message, true)));

byId("draw").hidden = byId("checked").hidden = !data.problems.length;
if (data.problems.length) {
  byId("problem").value = data.problems[0][0];
  showChecked();
}
introduce().catch((error) => say(error.message, true)).finally(() => { document.documentElement.dataset.ready = "yes"; });
