// What the live pages of an engine and of a router share.
const COLOURS = { lookup: "#8e7cc3", fetch: "#2f7ed8", upload: "#25b0a5", compute: "#e8833a", decode: "#5da84b", prefill: "#e8833a", "hand-off": "#c25fb0", transfer: "#c25fb0" };
const WAITS = ["#b9c3d0", "#a3afbf", "#8e9bad", "#79879b", "#667489", "#546378"];
const waits = [];
function colour(label) {
  if (COLOURS[label]) return COLOURS[label];
  if (!waits.includes(label)) waits.push(label);
  return WAITS[waits.indexOf(label) % WAITS.length];
}
const $ = id => document.getElementById(id);
const seconds = s => s == null ? "–" : s < 1 ? (s * 1000).toFixed(s < 0.1 ? 1 : 0) + " ms" : s.toFixed(2) + " s";
const percent = x => x == null ? "–" : (x * 100).toFixed(1) + " %";
const bytes = n => { for (const u of ["B", "KiB", "MiB", "GiB", "TiB"]) { if (n < 1024 || u === "TiB") return n.toFixed(n < 10 && u !== "B" ? 1 : 0) + " " + u; n /= 1024; } };
function make(tag, text, css) { const e = document.createElement(tag); if (text != null) e.textContent = text; if (css) e.style.cssText = css; return e; }
function segment(label, part) { const i = make("i", null, `width:${part * 100}%;background:${colour(label)}`); i.title = label; return i; }
function showHead(d, state, cards) {
  $("model").textContent = d.model;
  $("state").textContent = `${d.healthy ? "healthy" : d.reason}${state} · up ${Math.round(d.uptime_s)} s`;
  $("dot").style.background = d.healthy ? "#5da84b" : "#d64545";
  $("cards").replaceChildren(...cards.map(([value, name]) => { const c = make("div"); c.className = "card"; c.append(make("b", value), make("span", name)); return c; }));
}
function showLegend(entries, text) {
  $("legend").replaceChildren(...entries.map(([label, s]) => { const e = make("span"); e.append(make("i", null, "background:" + colour(label)), text(label, s)); return e; }));
}
const longestOf = requests => Math.max(...requests.map(r => r.spans.length ? r.spans.at(-1)[2] : 0)) || 1;
async function poll(url, show) {
  // Without the name and password that may stand in the page's own address: fetch takes no address that has them.
  try { show(await (await fetch(new URL(url, location.origin + location.pathname), { signal: AbortSignal.timeout(8000) })).json()); }
  catch (error) { $("state").textContent = "no answer"; $("dot").style.background = "#d64545"; }
  setTimeout(poll, 1000, url, show);
}
