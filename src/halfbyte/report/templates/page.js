"use strict";
const { tables: columns, specs, themes, palettes, first } = JSON.parse(document.getElementById("data").textContent);
const tables = Object.fromEntries(Object.entries(columns).map(([name, table]) => [name, asRows(table)]));
const one = (query, within = document) => within.querySelector(query);
const all = (query, within = document) => [...within.querySelectorAll(query)];
const state = { run: 0, on: 0, x: "bits", role: null, hidden: new Set(), theme: null };
const views = new Map();

function asRows(table) {
  const names = Object.keys(table);
  return (table[names[0]] ?? []).map((_, i) => Object.fromEntries(names.map((name) => [name, table[name][i]])));
}

const isDark = () => (state.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function rowsFor(name, element) {
  const perRun = element.closest("[data-per-run]") !== null;
  return tables[name].filter((row) =>
    (perRun ? row.run === state.run : !state.hidden.has(row.run))
    && (row.on === undefined || row.on === state.on)
    && (!element.closest("[data-per-role]") || row.role === state.role)
    && (element.dataset.of === undefined || row.of === element.dataset.of));
}

async function draw(element) {
  const holder = element.closest("[data-chart]");
  const kind = holder.dataset.chart;
  const data = { [holder.dataset.needs]: rowsFor(holder.dataset.needs, element) };
  if (kind === "reads") data.outliers = rowsFor("outliers", element);
  const theme = isDark() ? "dark" : "light";
  const spec = { ...specs[kind === "frontier" ? `frontier-${state.x}` : kind], datasets: data };
  views.get(element)?.finalize();
  const result = await vegaEmbed(element, spec, {
    actions: false, renderer: "svg", config: configured(theme, element.clientWidth),
    logLevel: 1, // errors, and no warnings
    tooltip: { disableDefaultStyle: true, formatTooltip: tooltip },
    patch: kind === "frontier" ? (compiled) => withNames(compiled, palettes[theme].ink) : undefined,
  });
  views.set(element, result);
  const palette = palettes[theme];
  for (const [signal, value] of Object.entries({ ...palette, chosen: state.run })) {
    if ((spec.params ?? []).some((param) => param.name === signal)) result.view.signal(signal, value);
  }
  result.view.addEventListener("click", (_, item) => clicked(kind, item?.datum));
  await result.view.runAsync();
}

// In little room, legends are columns: a wider one would leave none for the chart.
function configured(theme, width) {
  const config = themes[theme];
  return width > 600 ? config : { ...config, legend: { ...config.legend, columns: 1 } };
}

// Vega's own labels, which find free places beside the points and are left out where there is none.
function withNames(compiled, ink) {
  const anchor = ["right", "top-right", "bottom-right", "left", "top-left", "bottom-left", "top", "bottom"];
  compiled.marks.push({
    type: "text", from: { data: "points_marks" },
    encode: { enter: { text: { field: "datum.label" }, fill: { value: ink }, font: { value: themes.light.font }, fontSize: { value: 12 } } },
    transform: [{ type: "label", size: { signal: "[max(width, 1), max(height, 1)]" }, anchor, offset: [7], avoidMarks: ["points_marks", "front_marks"] }],
  });
  return compiled;
}

function tooltip(value, sanitize) {
  const rows = Object.entries(value).filter(([, said]) => said !== "" && said !== "null" && said !== "undefined" && said !== "NaN");
  return `<table>${rows.map(([key, said]) => `<tr><td class="key">${sanitize(key)}</td><td class="value">${sanitize(said)}</td></tr>`).join("")}</table>`;
}

function clicked(kind, datum) {
  if (!datum) return;
  if (kind === "errors") chooseRole(datum.role);
  else if (datum.run !== undefined && datum.run !== state.run) choose(datum.run);
}

async function drawAll(within = document) {
  for (const element of all("[data-needs]", within)) {
    const empty = rowsFor(element.dataset.needs, element).length === 0;
    element.hidden = empty;
  }
  await Promise.all(all(".chart", within).filter((element) => element.offsetParent !== null).map(draw));
}

function roles() {
  return [...new Set([...tables.spreads, ...tables.reads].filter((row) => row.run === state.run).map((row) => row.role))];
}

function chooseRole(role) {
  const known = roles();
  state.role = known.includes(role) ? role : known[0] ?? null;
  const select = one("#role");
  select.replaceChildren(...known.map((name) => new Option(name, name, false, name === state.role)));
  return drawAll(select.closest("section"));
}

async function choose(run) {
  state.run = run;
  one("#run").value = run;
  for (const row of all("#models tbody tr")) row.classList.toggle("is-chosen", Number(row.dataset.run) === run);
  for (const section of all(".of-run")) section.hidden = Number(section.dataset.run) !== run;
  one("[data-errors-of]").textContent = tables.runs[run].error_of;
  const known = roles();
  if (!known.includes(state.role)) state.role = known[0] ?? null;
  one("#role").replaceChildren(...known.map((name) => new Option(name, name, false, name === state.role)));
  listWeights();
  await drawAll();
}

const shown = (value, digits) => (value === null || value === undefined ? "" : value.toFixed(digits));

function cell(text, value) {
  const made = document.createElement("td");
  made.textContent = text;
  if (value !== undefined) {
    made.className = "number";
    made.dataset.value = value ?? "";
  }
  return made;
}

function listWeights() {
  const words = one("#find").value.toLowerCase();
  const rows = tables.weights.filter((row) => row.run === state.run);
  const found = rows.filter((row) => `${row.tensor} ${row.grid}`.toLowerCase().includes(words));
  one("#count").textContent = `${found.length} of ${tables.runs[state.run].quantized} quantized weights`;
  one("#weights").classList.toggle("no-activations", rows.every((row) => row.activations === null));
  one("#weights tbody").replaceChildren(...found.map((row) => {
    const made = document.createElement("tr");
    made.title = row.note;
    made.append(cell(row.tensor), cell(row.grid), cell(shown(row.bits, 3), row.bits), cell(shown(row.error, 4), row.error),
      cell(shown(row.worst, 4), row.worst), cell(shown(row.activations, 4), row.activations));
    return made;
  }));
}

function filterRuns() {
  const words = one("#filter").value.toLowerCase();
  state.hidden.clear();
  for (const row of all("#models tbody tr")) {
    const text = all("td", row).slice(0, 4).map((part) => part.textContent).join(" ").toLowerCase();
    const fits = text.includes(words);
    row.hidden = !fits || (row.dataset.on !== "" && Number(row.dataset.on) !== state.on);
    if (!fits) state.hidden.add(Number(row.dataset.run));
  }
  for (const row of all("#models tbody tr")) if (!row.hidden) state.hidden.delete(Number(row.dataset.run));
}

function sortBy(head) {
  const table = head.closest("table");
  const column = all("th", table).indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const isNumber = head.classList.contains("number");
  const key = (row) => {
    const part = row.cells[column];
    if (!isNumber) return part.textContent.toLowerCase();
    return part.dataset.value === undefined || part.dataset.value === "" ? null : Number(part.dataset.value);
  };
  const body = one("tbody", table);
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  });
  body.append(...rows);
}

function setTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  one("#theme").textContent = isDark() ? "Light" : "Dark";
}

function listen() {
  one("#theme").addEventListener("click", () => { state.theme = isDark() ? "light" : "dark"; setTheme(); drawAll(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { setTheme(); drawAll(); });
  one("#filter").addEventListener("input", () => { filterRuns(); drawAll(); });
  one("#find").addEventListener("input", listWeights);
  one("#run").addEventListener("change", (event) => choose(Number(event.target.value)));
  one("#role").addEventListener("change", (event) => chooseRole(event.target.value));
  one("#conditions")?.addEventListener("change", (event) => {
    state.on = Number(event.target.value);
    one("#measured span").textContent = event.target.selectedOptions[0].textContent;
    filterRuns();
    drawAll();
  });
  for (const radio of all("input[name=x]")) radio.addEventListener("change", () => { state.x = radio.value; draw(one("[data-chart=frontier] .chart")); });
  for (const head of all("table.sortable th")) head.addEventListener("click", () => sortBy(head));
  for (const button of all(".choose")) button.addEventListener("click", () => choose(Number(button.closest("tr").dataset.run)));
}

setTheme();
listen();
filterRuns();
choose(first).then(() => { document.documentElement.dataset.ready = ""; });
