// Puts the parts into the page.
function startHeader() {
  const { subject } = data;
  const about = [
    `${subject.rollouts}, ${subject.split}`, plural(subject.problems, "problem"), `${subject.small} and ${subject.large}`,
    `scores by ${subject.scorer}`, `cost model ${subject.cost}`, subject.caps || "no cap", subject.date,
  ];
  byId("subject").append(...about.map((text) => el("span", {}, text)));
  if (subject.cost !== "decode-only") byId("curves-title").textContent = "Accuracy against cost";
  document.title = `Routing evaluation: ${subject.rollouts}, ${subject.split}`;
}

startTheme();
startHeader();
startSummary();
startDeploy();
startCurves();
startTables();
startPositions();
startScorer();
startBrowser();
startNotes();
document.documentElement.dataset.ready = "yes";
