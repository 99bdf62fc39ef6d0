// The page: fetches the state of the runs every few seconds and draws what has changed.

import { Chart } from "/chart.js";
import { age, duration } from "/format.js";
import { averaged } from "/scale.js";
import { element, writeLegend, writeTable } from "/table.js";

const DASHES = [[], [7, 4], [2, 3]];
const MISSED = 3;
const byId = (id) => document.getElementById(id);
const controls = ["convention", "across", "up", "training", "validation"].map(byId);

let settings;
let charts = [];
let runs = [];
let tag = "";
let serverAhead = 0;
let fetched = 0;
let failures = 0;
let timer;
let loadingSince = null;

async function start() {
  settings = await (await fetch("/settings")).json();
  for (const [key, convention] of Object.entries(settings.conventions)) {
    const option = new Option(`flops/${key}: ${convention.label}`, key, false, key === settings.flops);
    byId("convention").append(option);
    byId("conventions").append(element("dt", "", `flops/${key}`), element("dd", "", convention.words));
  }
  const losses = { curves: ["loss", "validation"], up: "loss (nats per token)" };
  const first = [
    new Chart({ ...losses, title: "Loss against FLOPs", wide: true }),
    new Chart({ ...losses, title: "Loss against time", key: "seconds" }),
    new Chart({ ...losses, title: "Loss against tokens", key: "tokens" }),
    new Chart({ title: "Throughput", curves: ["throughput"], up: "tokens per second", key: "tokens" }),
    new Chart({ title: "Attended share of causal pairs", curves: ["share"], up: "share", key: "tokens" }),
  ];
  first.forEach(addChart);
  for (const control of controls) control.addEventListener("change", changed);
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  setInterval(tick, 1000);
  await refresh();
}

function changed(event) {
  const other = event.target.id === "across";
  if (other) {
    // The server thins for the axis: everything is fetched anew.
    tag = "";
    charts.forEach((chart) => chart.zoom(null));
  }
  draw();
  if (other) refresh();
}

async function refresh() {
  clearTimeout(timer);
  let wait = settings.poll;
  try {
    const scale = byId("across").value;
    const headers = tag ? { "If-None-Match": `"${tag}"` } : {};
    const answer = await fetch(`/state?scale=${scale}&since=${tag}`, { headers, cache: "no-store" });
    if (answer.status === 200) {
      const content = await answer.arrayBuffer();
      if (scale === byId("across").value) wait = update(content);
    } else if (answer.status !== 304) throw new Error(`the server answers ${answer.status}`);
    failures = 0;
    fetched = performance.now();
  } catch (error) {
    failures += 1;
  }
  tick();
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, 1000 * wait);
}

/** Take in a state and draw it; gives the seconds until the next. */
function update(content) {
  const began = performance.now();
  const length = new DataView(content).getUint32(0, true);
  const state = JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
  let offset = 4 + length;
  runs = state.runs.map((facts, number) => {
    const { curves, ...run } = facts;
    run.hidden = runs[number]?.hidden ?? false;
    run.style = styleOf(number);
    run.curves = runs[number]?.curves ?? {};
    run.smooth = runs[number]?.smooth ?? {};
    if (curves) {
      [run.curves, run.smooth] = [{}, {}];
      for (const name of Object.keys(curves)) {
        run.curves[name] = {};
        for (const column of settings.curves[name] ?? settings.scored) {
          run.curves[name][column] = new Float32Array(content, offset, curves[name]);
          offset += 4 * curves[name];
        }
        // Scores are drawn as they are, as validation is.
        run.smooth[name] = name in settings.curves ? averaged(run.curves[name]) : run.curves[name];
      }
    }
    return run;
  });
  tag = state.tag;
  serverAhead = state.now - Date.now() / 1000;
  writeNotes(state);
  writeProgress(state);
  addScores();
  draw();
  measure(began);
  return state.loading ? 0.3 : settings.poll;
}

/** Add a chart for each score that a run has and no chart shows yet. */
function addScores() {
  for (const name of runs.flatMap((run) => Object.keys(run.curves))) {
    if (name in settings.curves || charts.some((chart) => chart.curves.includes(name))) continue;
    const words = name.split("/").slice(1).join(" ");
    addChart(new Chart({ title: `${words} against FLOPs`, curves: [name], up: words, scored: true }));
  }
}

function addChart(chart) {
  charts.push(chart);
  chart.onHover = (found) => charts.forEach((other) => other.hover(found, other === chart));
  byId("charts").append(chart.figure);
}

/** Leave the time of this update, and that until its frame was drawn, where measuring programs look for them. */
function measure(began) {
  performance.clearMeasures();
  performance.measure("update", { start: began });
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => performance.measure("frame", { start: began });
    channel.port2.postMessage(null);
  });
}

function styleOf(number) {
  const colours = settings.colours;
  const round = Math.floor(number / colours.length);
  return { colour: colours[number % colours.length], dash: DASHES[round % DASHES.length] };
}

function writeNotes(state) {
  const notes = [...state.notes, ...state.runs.flatMap((run) => run.notes.map((note) => `${run.label}: ${note}`))];
  const list = byId("notes");
  list.hidden = notes.length === 0;
  if (list.dataset.told !== notes.join("\n")) {
    list.dataset.told = notes.join("\n");
    list.replaceChildren(...notes.map((note) => element("li", "", note)));
  }
}

function writeProgress(state) {
  const bar = byId("progress");
  bar.hidden = !state.loading;
  if (!state.loading) {
    loadingSince = null;
    return;
  }
  bar.value = state.total ? state.read / state.total : 0;
  loadingSince ??= { time: performance.now(), read: state.read };
  const seconds = (performance.now() - loadingSince.time) / 1000;
  const speed = (state.read - loadingSince.read) / seconds;
  const left = speed > 0 ? `, ${duration((state.total - state.read) / speed)} left` : "";
  loadingSince.text = `reading the records: ${Math.floor(100 * bar.value)}%${left}`;
}

/** Write what depends on the clock. */
function tick() {
  const state = byId("state");
  const seconds = (performance.now() - fetched) / 1000;
  const lost = failures >= MISSED || (failures > 0 && fetched === 0);
  state.classList.toggle("lost", lost);
  const many = runs.length === 1 ? "1 run" : `${runs.length} runs`;
  if (lost) write(state, fetched ? `no answer from the server for ${age(seconds)}` : "no answer from the server");
  else if (loadingSince) write(state, loadingSince.text);
  else if (fetched) write(state, `${many}, looked at every ${settings.poll} seconds`);
  writeTable(byId("runs"), runs, Date.now() / 1000 + serverAhead);
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function draw() {
  const convention = byId("convention").value;
  for (const chart of charts) if (chart === charts[0] || chart.scored) chart.key = `flops/${convention}`;
  const [training, validation] = [byId("training").value, byId("validation").checked];
  const shown = { loss: training !== "none", validation };
  for (const chart of charts) {
    chart.show({
      runs,
      units: settings.axes[chart.key],
      log: byId("across").value === "log",
      range: byId("up").value,
      shown,
      averaged: training !== "every",
    });
  }
  writeLegend(byId("legend"), runs, toggle, alone);
  writeTable(byId("runs"), runs, Date.now() / 1000 + serverAhead);
}

function toggle(number) {
  runs[number].hidden = !runs[number].hidden;
  draw();
}

function alone(number) {
  const already = runs.every((run, other) => run.hidden === (other !== number));
  runs.forEach((run, other) => (run.hidden = !already && other !== number));
  draw();
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  charts.forEach((chart) => chart.redraw());
}

function remembered() {
  try {
    return THEMES.find((theme) => theme === localStorage.getItem("theme")) ?? "system";
  } catch {
    return "system";
  }
}

byId("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  setTheme(theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // A browser that keeps nothing forgets the choice.
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw()));
setTheme(remembered());
start().catch(() => {
  byId("state").textContent = "no answer from the server: reload when it runs again";
});
