// Which setting to deploy: for a budget or an accuracy, what it costs in money, and the command that serves it.
function startDeploy() {
  const methods = data.methods.filter(({ kind, points }) => points.some((point) => point.on_curve && (point.serve || kind === "threshold")));
  if (!methods.length) return byId("deploy").remove();
  const [small, large] = Object.values(data.references);
  const [method, goal, value, volume, largePrice, smallPrice] = ["method", "goal", "value", "volume", "large-price", "small-price"].map((name) => byId(`deploy-${name}`));
  method.append(...methods.map(({ name }) => el("option", { value: name }, name)));

  const money = (x) => {
    const digits = Math.abs(x) < 100 ? 2 : 0;
    return `${x < 0 ? "\u2212" : ""}$\u00a0${Math.abs(x).toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: digits })}`;
  };
  const shown = (input, text) => {
    byId(`${input.id}-is`).textContent = text;
    input.setAttribute("aria-valuetext", text);
  };
  const span = () => {
    const most = Math.max(...methods.flatMap((each) => each.points.map((point) => point.accuracy[0])), large.accuracy[0]);
    const ends = goal.value === "budget" ? [1, 100, 20]
      : [100 * small.accuracy[0], 100 * most, 100 * (small.accuracy[0] + 0.8 * (large.accuracy[0] - small.accuracy[0]))];
    [value.min, value.max, value.value] = [Math.floor(ends[0]), Math.ceil(ends[1]), Math.round(ends[2])];
  };

  /** The setting on the method's hull, which validation chose, that keeps a budget or is the least to reach an accuracy. */
  function recommended(points, wanted) {
    if (goal.value === "budget") {
      const within = points.filter((point) => point.c <= wanted);
      return within.length ? [within.at(-1), ""]
        : [points[0], `No setting costs so little: this is the least. Below it the small model alone is left, or \u201c--budget\u201d of a policy for a range of λ.`];
    }
    const reaching = points.find((point) => point.accuracy[0] >= wanted);
    if (!reaching) return [nearest(points, (point) => -point.accuracy[0], -1), "No setting reaches it: this one comes nearest."];
    return [reaching, reaching.accuracy[1] < wanted ? `On other problems it may miss it: the interval begins at ${percent(reaching.accuracy[1])}.` : ""];
  }

  function show() {
    const own = methods.find(({ name }) => name === method.value);
    const points = own.points.filter((point) => point.on_curve);
    const [point, remark] = recommended(points, value.value / 100);
    shown(value, goal.value === "budget" ? `At most ${value.value}\u00a0% of always-large's cost` : `At least ${value.value}\u00a0% solved`);
    const problems = 10 ** volume.value;
    shown(volume, whole(Math.round(Number(problems.toPrecision(2)))));
    for (const price of [largePrice, smallPrice]) shown(price, money(Number(price.value)));
    const cost = (tokens) => ((tokens.large * largePrice.value + tokens.small * smallPrice.value) / 1e6) * problems;
    const taken = { large: point.large_tokens, small: point.total_tokens - point.large_tokens };
    const saved = cost(data.alone.large) - cost(taken);
    const rows = [["the large model alone", data.alone.large], [`${own.name}, ${point.label}`, taken], ["the small model alone", data.alone.small]];
    byId("deploy-result").replaceChildren(
      el("dl", { class: "facts" },
        fact("Recommended setting", el("b", {}, `${own.name}, ${point.label}`)),
        fact("Problems solved", pair(interval(point.accuracy))),
        fact(COST === "cost" ? "Cost" : "Large-model tokens", pair(`${interval(point.cost)} of always-large's`)),
        fact("Escalations", `${decimal(point.escalations, 2)} a problem`),
        fact("Saved", el("b", {}, money(saved)), ` of ${money(cost(data.alone.large))}`)),
      remark && el("p", { class: "notice" }, remark),
      table([["Who answers", "Large tokens a problem", "Small tokens a problem", "Money"],
        ...rows.map(([name, tokens]) => [name, decimal(tokens.large), decimal(tokens.small), money(cost(tokens))])]));
    const command = point.serve ?? "python train.py --agent threshold # this page tried thresholds that no run has: train one to serve it";
    byId("deploy-command").replaceChildren(...command.split(" ").flatMap((word) => [el("span", {}, word), " "]).slice(0, -1));
    byId("deploy-show").hidden = !data.settings.some((each) => each.method === own.name);
    byId("deploy-show").onclick = () => {
      const settings = data.settings.map((each, i) => [each, i]).filter(([each]) => each.method === own.name);
      chosen.set(nearest(settings, ([each]) => each.share, point.c)[1]);
      byId("problem-list").focus();
    };
  }

  byId("deploy-copy").addEventListener("click", async ({ target }) => {
    const command = byId("deploy-command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      target.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command); // pages opened from a disk may not write there
      target.textContent = "Selected: copy with Ctrl-C";
    }
    setTimeout(() => { target.textContent = "Copy"; }, 4000);
  });
  goal.addEventListener("change", () => { span(); show(); });
  for (const input of [method, value, volume, largePrice, smallPrice]) input.addEventListener("input", show);
  span();
  show();
}
