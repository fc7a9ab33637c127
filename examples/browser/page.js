// The page: asks the base (K = 1) and the loop the same question, one after the other. worker.js computes.

const $ = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
const model = parameters.get("model") ?? document.querySelector("meta[name=loopexport-model]").content;
let worker, graphs, waiting;

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  if (!graphs) $("about").textContent = "";
  $("choose").hidden = Boolean(graphs);
}

/** Send a message to the worker; what it answers at the end, or null after an error. */
function request(message) {
  worker.postMessage(message);
  return new Promise((resolve) => (waiting = resolve));
}

const parts = (side) => ({
  bar: $(side).querySelector("progress"), answer: $(side).querySelector(".answer"), note: $(side).querySelector("small"),
});

const RECEIVE = {
  progress({ side, share, mib }) {
    const { bar, note } = parts(side);
    bar.value = share;
    bar.classList.add("on");
    note.textContent = share < 1 ? `Loading ${Math.round(share * mib)} of ${Math.round(mib)} MiB` : "Preparing the graph";
  },
  asked({ side }) {
    const { bar, note } = parts(side);
    bar.classList.remove("on");
    note.textContent = "Reading the question";
  },
  text({ side, text }) {
    parts(side).answer.textContent += text;
    parts(side).note.textContent = "Answering";
  },
  answered(message) {
    const { side, tokens, seconds, rate, stopped } = message;
    const speed = rate ? `, ${rate.toFixed(1)} tokens a second` : "";
    parts(side).note.textContent = `${tokens.length} tokens${speed}, first after ${seconds.toFixed(2)} s${stopped ? ", stopped" : ""}`;
    $(side).dataset.tokens = tokens.join(" ");
    waiting(message);
  },
  opened: (message) => waiting(message),
  failed({ side, message }) {
    if (side) {
      parts(side).bar.classList.remove("on");
      parts(side).note.textContent = "";
    }
    fail(message);
    waiting(null);
  },
};

const in_format = () => graphs.filter(({ format }) => format === $("format").value);
const loops = () => in_format().filter(({ steps }) => steps > 1);
const base = () => in_format().find(({ steps }) => steps === 1);
const loop = () => loops()[$("steps").value];

/** Show the K of the slider, and what this format lacks. */
function show_steps() {
  $("k").textContent = $("loop-k").textContent = loop()?.steps ?? "none";
  const lacking = [base() ? [] : ["1"], loop() ? [] : ["4"]].flat();
  $("note").textContent = lacking.length
    ? `No graph of K = ${lacking.join(" and ")} in this format: write it with loopexport onnx --steps 1,2,4,8`
    : "";
  $("ask").textContent = base() && loop() ? "Ask both" : "Ask";
}

function show_format() {
  const steps = loops().map((graph) => graph.steps);
  $("steps").max = Math.max(steps.length - 1, 0);
  $("steps").value = Math.min(1, steps.length - 1);
  $("steps").disabled = steps.length < 2;
  $("choices").textContent = steps.length > 1 ? `(${steps.join(", ")})` : "";
  show_steps();
}

async function open() {
  const opened = await request({
    type: "open", model, page: location.href, library: parameters.get("library"), device: parameters.get("device"),
  });
  if (!opened) return;
  graphs = opened.graphs;
  const mib = (format) => Math.round(Math.max(...graphs.filter((graph) => graph.format === format).map(({ bytes }) => bytes)) / 2 ** 20);
  for (const format of new Set(graphs.map((graph) => graph.format))) $("format").add(new Option(`${format}, ${mib(format)} MiB`, format));
  const span = [opened.span].flat(2).join(":").replace(/(:\d+):(?=\d)/g, "$1 and ");
  $("about").textContent = `${opened.name}: layers ${span} run K times. Runs here, on ${opened.device === "webgpu" ? "the GPU" : "the CPU"}; nothing you type leaves this page.`;
  document.body.dataset.device = opened.device;
  show_format();
  $("form").hidden = $("sides").hidden = false;
}

async function ask(event) {
  event.preventDefault();
  $("error").hidden = true;
  $("ask").disabled = $("format").disabled = $("steps").disabled = true;
  $("stop").disabled = false;
  const prompt = $("prompt").value;
  const asked = { base: base(), loop: loop() };
  for (const side of ["base", "loop"]) {
    parts(side).answer.textContent = parts(side).note.textContent = "";
    delete $(side).dataset.tokens;
  }
  for (const [side, graph] of Object.entries(asked)) {
    if (!graph) continue;
    parts(side).note.textContent = "Waiting";
    const answered = await request({ type: "ask", side, graph, prompt, maxNewTokens: Number($("limit").value) });
    if (!answered || answered.stopped) break;
  }
  $("ask").disabled = $("format").disabled = false;
  $("steps").disabled = loops().length < 2;
  $("stop").disabled = true;
}

if (location.protocol === "file:") {
  fail("Browsers load no model from a file. Serve this page: python examples/browser/serve.py DIRECTORY");
  $("choose").hidden = true;
} else {
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => RECEIVE[data.type](data);
  worker.onerror = (event) => RECEIVE.failed({ message: `The page's worker failed: ${event.message ?? "worker.js is missing"}` });
  $("choose").elements.model.value = model;
  $("form").onsubmit = ask;
  $("stop").onclick = () => worker.postMessage({ type: "stop" });
  $("steps").oninput = show_steps;
  $("format").onchange = show_format;
  open();
}
