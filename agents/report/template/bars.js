// Two pictures with a column for each step or score: where a router escalates, and whether scores are calibrated.

/** Makes columns readable one by one: by pointer, or by arrow keys once focused. Returns a function that re-lays them. */
function readable(box, label) {
  const { layer, tip, tell } = pointer(box, { "aria-label": label, "aria-valuemin": 1 });
  let columns = [];
  let now = -1;
  let total = 0;
  const show = (index) => {
    now = columns.length ? clamp(index, 0, columns.length - 1) : -1;
    tip.hidden = now < 0;
    box.querySelectorAll(".column").forEach((each, i) => each.classList.toggle("now", i === now));
    if (now < 0) return;
    const { x, lines } = columns[now];
    tell(lines, x, 12, total);
    tip.style.top = "8px";
    layer.setAttribute("aria-valuenow", now + 1);
    layer.setAttribute("aria-valuetext", lines.join(", "));
  };
  const hide = () => {
    tip.hidden = true;
    box.querySelectorAll(".column.now").forEach((each) => each.classList.remove("now"));
  };
  layer.addEventListener("pointermove", (event) => {
    const left = event.clientX - layer.getBoundingClientRect().left;
    if (columns.length) show(columns.indexOf(nearest(columns, (each) => each.x, left)));
  });
  layer.addEventListener("pointerleave", () => document.activeElement === layer || hide());
  layer.addEventListener("focus", () => layer.matches(":focus-visible") && show(Math.max(now, 0)));
  layer.addEventListener("blur", hide);
  layer.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -999, End: 999 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show((now < 0 ? 0 : now) + moves[event.key]);
  });
  return (width, height, found) => {
    total = width;
    columns = found;
    now = Math.min(now, columns.length - 1);
    layer.style.height = `${height}px`;
    layer.setAttribute("aria-valuemax", Math.max(columns.length, 1));
    layer.setAttribute("aria-valuenow", Math.max(now, 0) + 1);
    hide();
  };
}

function startPositions() {
  const box = byId("position-chart");
  const measure = byId("position-measure");
  const lay = readable(box, "Where the router escalates, column by column; left and right choose one");
  settingSelects(byId("position-method"), byId("position-setting"));
  const head = { per_100: "Per 100 solutions", share: "Share of decisions", parts: "Share of escalations" };

  const columns = () => {
    const { decisions, escalations, share, per_100, parts } = chosen.setting.positions;
    if (measure.value === "parts")
      return parts.map((value, i) => ({
        name: `${10 * i}–${10 * (i + 1)} %`, value, cells: [interval(value)],
        lines: [`${10 * i} to ${10 * (i + 1)} % of the solution`, `${interval(value)} of all escalations`],
      }));
    const last = decisions.findLastIndex((n) => n > 0) + 1;
    return decisions.slice(0, last).map((n, i) => {
      const cells = [interval(per_100[i], decimal), interval(share[i]), whole(escalations[i])];
      return {
        name: String(i + 1), value: measure.value === "share" ? share[i] : per_100[i], cells,
        lines: [
          `Step ${i + 1}`,
          `${cells[0]} escalations in 100 solutions`,
          `${cells[1]} of the decisions`,
          `${cells[2]} of ${plural(n, "decision")} escalated`,
        ],
      };
    });
  };

  const redraw = onWidth(box, (width) => {
    const height = clamp(0.36 * width, 220, 300);
    const edge = { left: 46, right: 12, top: 14, bottom: 46 };
    const found = columns();
    const factor = measure.value === "per_100" ? 1 : 100;
    const most = Math.max(...found.flatMap((each) => each.value).filter(known), 0);
    const top = most > 0 ? 1.05 * most : 1 / factor;
    const y = (value) => height - edge.bottom - ((height - edge.top - edge.bottom) * value) / top;
    const room = (width - edge.left - edge.right) / Math.max(found.length, 1);
    const x = (i) => edge.left + room * (i + 0.5);
    const every = Math.ceil((measure.value === "parts" ? 62 : 26) / room);
    const svg = frame(box, width, height, edge, x, y, {
      title: "Escalations by their place in the solution; the table below holds the same numbers",
      y: ticks(0, factor * top, height / 55).map((tick) => [tick / factor, decimal(tick, factor * top < 5 ? 1 : 0)]),
      x: found.map((each, i) => [i, each.name]).filter(([i]) => i % every === 0),
      below: measure.value === "parts" ? "Place in the solution" : "Step",
      beside: { per_100: head.per_100, share: "Decisions, %", parts: "Escalations, %" }[measure.value],
    });
    found.forEach((each, i) => {
      const [value, low, high] = each.value;
      if (!known(value)) return svg.append(draw("g", { class: "column" }));
      const wide = Math.min(0.72 * room, 46);
      return svg.append(
        draw("g", { class: "column" },
          draw("rect", { x: x(i) - wide / 2, y: y(value), width: wide, height: Math.max(y(0) - y(value), 0) }),
          whisker(x(i), y, low, high)),
      );
    });
    svg.append(draw("line", { class: "zero", x1: edge.left, x2: width - edge.right, y1: y(0), y2: y(0) }));
    lay(width, height, found.map((each, i) => ({ x: x(i), lines: each.lines })));
    const { method, label, counts } = chosen.setting;
    const trees = data.subject.trees;
    const none = most === 0 ? " It never escalates." : "";
    byId("position-note").replaceChildren(
      `${method}, ${label}, all ${plural(trees, "solution")} of the split.${none} Of them ` +
        `${percent(counts.rescued / trees)} rescued, ${percent(counts.wasted / trees)} with wasted escalations, ` +
        `${percent(counts.wrong / trees)} wrong (the words are explained below). Lines on the columns are 95 % bootstrap ` +
        "intervals over problems; late steps rest on few solutions.",
    );
    tabulate(box, [
      measure.value === "parts" ? ["Place", head.parts] : ["Step", head.per_100, head.share, "Escalations"],
      ...found.map((each) => [each.name, ...each.cells]),
    ]);
  });
  measure.addEventListener("change", redraw);
  chosen.listeners.push(redraw);
}

function startScorer() {
  const box = byId("scorer-chart");
  const select = byId("scorer-target");
  const lay = readable(box, "Score bins; left and right choose one");
  select.append(...data.reliability.map((each, i) => el("option", { value: i }, each.text)));

  const redraw = onWidth(box, (width) => {
    const target = data.reliability[Number(select.value)];
    const height = clamp(0.5 * width, 300, 380);
    const edge = { left: 46, right: 16, top: 14, bottom: 46 };
    const counts = 54; // room for the columns of counts
    const x = (score) => edge.left + (width - edge.left - edge.right) * score;
    const y = (share) => height - edge.bottom - counts - (height - edge.top - edge.bottom - counts) * share;
    const svg = frame(box, width, height, edge, x, y, {
      title: "Share that is right against the score; the table below holds the same numbers",
      y: [0, 0.2, 0.4, 0.6, 0.8, 1].map((tick) => [tick, decimal(100 * tick, 0)]),
      x: [0, 0.2, 0.4, 0.6, 0.8, 1].map((tick) => [tick, decimal(tick)]),
      below: "Score", beside: "Right, %",
    });
    svg.append(draw("path", { class: "mixture", d: `M${x(0)},${y(0)}L${x(1)},${y(1)}` }));
    const tallest = Math.max(...target.bins.map((bin) => bin.count), 1);
    const floor = height - edge.bottom;
    target.bins.forEach((bin) => {
      const tall = Math.max(((counts - 12) * bin.count) / tallest, 1);
      svg.append(draw("rect", { class: "count", x: x(bin.low) + 2, width: Math.max(x(bin.high) - x(bin.low) - 4, 1), y: floor - tall, height: tall }));
    });
    svg.append(draw("path", { class: "thin", d: polyline(target.bins.map((bin) => [x(bin.score), y(bin.right[0])])) }));
    target.bins.forEach((bin) => {
      const [value, low, high] = bin.right;
      svg.append(draw("g", { class: "column dot" }, whisker(x(bin.score), y, low, high),
        draw("circle", { cx: x(bin.score), cy: y(value), r: 5 })));
    });
    svg.append(draw("line", { class: "zero", x1: edge.left, x2: width - edge.right, y1: floor, y2: floor }));
    const name = (bin) => `${decimal(bin.low)} to ${decimal(bin.high)}`;
    lay(width, height, target.bins.map((bin) => ({
      x: x(bin.score),
      lines: [`Scores ${name(bin)}`, `right: ${interval(bin.right)}`, `mean score ${decimal(bin.score, 3)}`, plural(bin.count, "case")],
    })));
    byId("scorer-note").textContent =
      `${data.subject.scorer} on ${plural(target.count, target.name === "least" ? "solution" : "step")} that the small model wrote by itself. ` +
      "On the dashed line a score is the probability of being right; above it the scorer is too strict, below it too " +
      `lenient. Mean distance (expected calibration error) ${decimal(target.error, 3)}; the chance that something right ` +
      `scores above something wrong (AUC) is ${decimal(target.auc, 3)}. A router needs the order of scores more than their ` +
      "level. Grey columns count the cases; lines are 95 % bootstrap intervals over problems.";
    tabulate(box, [
      ["Scores", "Cases", "Mean score", "Right"],
      ...target.bins.map((bin) => [name(bin), whole(bin.count), decimal(bin.score, 3), interval(bin.right)]),
    ]);
  });
  select.addEventListener("change", redraw);
}
