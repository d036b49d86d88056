// The setting that the page looks at, and what its costs are made of.
/** What costs are made of: the default model counts the large model's tokens alone. */
const COST = data.subject.cost === "decode-only" ? "large-model tokens" : "cost";

/** Which of `data.settings` is looked at, for every part of the page; parts are told when it changes. */
const chosen = {
  index: data.first,
  listeners: [],
  set(index) {
    if (index === this.index) return;
    this.index = index;
    for (const listener of this.listeners) listener();
  },
  get setting() {
    return data.settings[this.index];
  },
};

/** Keeps two selects, of methods and of their settings, in step with what is chosen. */
function settingSelects(methodSelect, settingSelect) {
  const methods = [...new Set(data.settings.map((each) => each.method))];
  methodSelect.append(...methods.map((name) => el("option", { value: name }, name)));
  const show = () => {
    methodSelect.value = chosen.setting.method;
    const own = data.settings.map((each, i) => [each, i]).filter(([each]) => each.method === chosen.setting.method);
    settingSelect.replaceChildren(
      ...own.map(([each, i]) => el("option", { value: i }, `${each.label} (cost ${percent(each.share, 0)})`)),
    );
    settingSelect.value = chosen.index;
  };
  methodSelect.addEventListener("change", () => {
    const cost = chosen.setting.share;
    const own = data.settings.map((each, i) => [each, i]).filter(([each]) => each.method === methodSelect.value);
    chosen.set(nearest(own, ([each]) => each.share, cost)[1]);
  });
  settingSelect.addEventListener("change", () => chosen.set(Number(settingSelect.value)));
  chosen.listeners.push(show);
  show();
}
