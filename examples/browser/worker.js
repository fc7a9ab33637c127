// Loads graphs and generates with transformers.js, so that the page stays responsive. page.js sends the messages:
//   {type: "open", model, library}                        -> {type: "opened", graphs, ...}
//   {type: "ask", side, graph, prompt, maxNewTokens}      -> {type: "text", ...}, ..., {type: "answered", ...}
//   {type: "stop"}
// Each may be answered by {type: "progress", ...} or {type: "failed", message} too.

// transformers.js 4 and the ONNX Runtime that it was built with. A copy on your own server: see `local` below.
const TRANSFORMERS = "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.2";
const HUB = "https://huggingface.co/";
const REPOSITORY = /^[\w.-]+\/[\w.-]+$/;
const MIB = 2 ** 20;
// Formats of graphs, the best first, on a GPU and on a CPU, where ONNX Runtime's int4 and int8 are slower than fp32. A GPU without fp16 runs no graph in fp16; a CPU runs plain ones.
const ORDER = { webgpu: ["q4f16", "q4", "fp16", "int8f16", "int8", "fp32"], wasm: ["fp32", "int8", "q4"] };

class Advice extends Error {} // an error whose message says what to do

let library, source, stopping;
const models = { base: null, loop: null }; // by side of the page: {graph, model}

/** The `message` of an error, and what to do about it. */
function explain(error) {
  const text = String(error?.message ?? error);
  if (error instanceof Advice) return text;
  if (/bad_alloc|out of memory|allocation|memory access|^\d+$/i.test(text)) {
    return `The weights do not fit into the memory of this browser (${text}). Write smaller ones: loopexport onnx DIRECTORY --dtype fp16`;
  }
  if (/unsupported model type/i.test(text)) return `${text}. transformers.js does not know this family; use loopexport run`;
  return text;
}

/** transformers.js, from the CDN or from `local`, a folder of npm packages on the page's own server. */
async function load_library(local) {
  const root = local && new URL(local.replace(/\/?$/, "/"), location.href);
  if (root && root.origin !== location.origin) throw new Advice("?library= takes a folder on the server of this page only");
  const url = root ? new URL("@huggingface/transformers/dist/transformers.min.js", root).href : TRANSFORMERS;
  let loaded;
  try {
    loaded = await import(url);
  } catch (error) {
    throw new Advice(`Cannot load transformers.js from ${url}: check the network, or add ?library=FOLDER with a copy (${error.message})`);
  }
  if (root) {
    const file = (type) => new URL(`onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.${type}`, root).href;
    loaded.env.backends.onnx.wasm.wasmPaths = { mjs: file("mjs"), wasm: file("wasm") };
  }
  return loaded;
}

/** Where a model is: a repository of the Hub (NAMESPACE/NAME), else a directory, relative to the page. */
function locate(model, page) {
  if (REPOSITORY.test(model) && !model.startsWith(".")) {
    return { id: model, name: model, url: new URL(`${model}/resolve/main/`, HUB).href };
  }
  const url = new URL(model.replace(/\/?$/, "/"), page);
  if (url.origin !== new URL(page).origin) throw new Advice(`${model} is on another server; give a directory beside this page, or a Hub id`);
  return { id: "this/server", name: model, url: url.href };
}

/** A file of the model, or an error that says what to give. */
async function fetch_file(path) {
  const url = new URL(path, source.url).href;
  const response = await fetch(url, { cache: "no-cache" }).catch((error) => {
    throw new Advice(`Cannot reach ${url}: ${error.message}`);
  });
  if (!response.ok) {
    throw new Advice(
      `No ${path} in ${source.name} (${response.status}). Give the directory or the public repository of an export with ONNX ` +
        "graphs: ?model=DIRECTORY/ or ?model=NAMESPACE/NAME",
    );
  }
  return response;
}

/** Keep downloads in the browser until the manifest changes, which lists a digest of every file. */
async function use_own_cache(env, manifest) {
  if (!globalThis.caches || !globalThis.crypto?.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(manifest)));
  const prefix = `loopexport ${source.url} `;
  env.cacheKey = prefix + Array.from(digest.slice(0, 8), (byte) => byte.toString(16).padStart(2, "0")).join("");
  for (const key of await caches.keys()) {
    if (key.startsWith(prefix) && key !== env.cacheKey) await caches.delete(key);
  }
}

/** "webgpu" or "wasm", and whether it computes in fp16. */
async function choose_device(wanted) {
  const adapter = wanted === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter && wanted === "webgpu") throw new Advice("This browser has no WebGPU; remove ?device=webgpu");
  return { device: adapter ? "webgpu" : "wasm", fp16: adapter?.features.has("shader-f16") ?? false };
}

/** The graphs that this page can run, from the manifest: name, K, format, weight files and their size. */
function usable_graphs(manifest, { device, fp16 }) {
  const records = Object.entries(manifest.onnx ?? {}).filter(([, record]) => record.steps != null);
  if (!records.length) throw new Advice(`${source.name} has no ONNX graphs. Write some: loopexport onnx DIRECTORY --steps 1,2,4,8`);
  const sizes = { ...manifest.weights, ...manifest.onnx };
  const graphs = records
    .filter(([, record]) => record.attention === "portable")
    .map(([file, record]) => ({
      file,
      steps: record.steps,
      format: /_(q4f16|q4|int8f16|int8)\.onnx$/.exec(file)?.[1] ?? record.dtype,
      data: record.data,
      bytes: record.data.reduce((sum, name) => sum + (sizes[name]?.size ?? 0), record.size),
    }))
    .filter(({ format }) => ORDER.webgpu.includes(format) && (fp16 || !format.endsWith("16") || (device === "wasm" && format === "fp16")));
  if (!graphs.length) {
    const there = records.map(([file, record]) => `${file} (${record.dtype}, ${record.attention})`).join(", ");
    throw new Advice(`This browser runs none of the graphs: ${there}. Write others: loopexport onnx DIRECTORY --steps 1,2,4,8 --dtype fp32`);
  }
  const place = ({ format }) => [...ORDER[device], ...ORDER.webgpu].indexOf(format);
  return graphs.sort((a, b) => place(a) - place(b) || a.steps - b.steps);
}

async function open({ model, page, library: local, device }) {
  source = locate(model, page);
  const text = await (await fetch_file("loopexport.json")).text();
  const manifest = JSON.parse(text);
  source.device = await choose_device(device);
  const graphs = usable_graphs(manifest, source.device);
  source.config = await (await fetch_file("base/config.json")).json();
  library = await load_library(local);
  const { env, AutoTokenizer } = library;
  if (source.id === "this/server") Object.assign(env, { remoteHost: source.url.replace(/[^/]+\/$/, ""), remotePathTemplate: source.url.match(/[^/]+\/$/)[0] });
  await use_own_cache(env, text);
  source.tokenizer = await AutoTokenizer.from_pretrained(source.id);
  // transformers.js 4.3 looks for templates in tokenizer_config.json alone.
  if ("chat_template.jinja" in manifest.files) source.tokenizer.chat_template = await (await fetch_file("chat_template.jinja")).text();
  return { type: "opened", name: source.name, device: source.device.device, span: manifest.spec.span, graphs };
}

/** Let the worker receive messages between two tokens: a promise alone does not. */
function next_message() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(null);
  });
}

/** The model of a side. The one before is freed first: each holds its own copy of the weights. */
async function load_model(side, graph) {
  if (models[side]?.graph.file === graph.file) return models[side];
  await models[side]?.model.dispose();
  models[side] = null;
  const loaded = {};
  const model = await library.AutoModelForCausalLM.from_pretrained(source.id, {
    config: { ...source.config, ...(await slots_field(graph)) },
    subfolder: "",
    model_file_name: graph.file.replace(/\.onnx$/, ""),
    dtype: "fp32", // a name without suffix, whatever the numbers are
    device: source.device.device,
    session_options: { externalData: graph.data.map((name) => ({ path: name, data: name })) },
    progress_callback: ({ status, file, loaded: bytes }) => {
      if (status !== "progress") return;
      loaded[file] = bytes;
      const sum = Object.values(loaded).reduce((total, each) => total + each, 0);
      postMessage({ type: "progress", side, share: Math.min(sum / graph.bytes, 1), mib: graph.bytes / MIB });
    },
  });
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => (await next_message(), forward(inputs));
  const { eos_token_id, pad_token_id } = { ...source.config, ...model.generation_config };
  model.configs.generation_config = null; // without its penalties
  models[side] = { graph, model, ends: { eos_token_id, pad_token_id } };
  return models[side];
}

/** The graph's number of cache slots, in the field that transformers.js reads it from. Loops of kv per_step have more than layers. */
async function slots_field({ file }) {
  const text = new TextDecoder("latin1").decode(await (await fetch_file(file)).arrayBuffer());
  const slots = new Set(text.match(/past_key_values\.\d+\.key/g)).size;
  return { [["num_hidden_layers", "n_layer", "num_layers", "n_layers"].find((name) => name in source.config)]: slots };
}

/** The token ids of a question in the chat template, or of a text to continue if there is none. */
function encode(prompt) {
  const { tokenizer } = source;
  if (!tokenizer.chat_template) return tokenizer(prompt);
  return tokenizer.apply_chat_template([{ role: "user", content: prompt }], { add_generation_prompt: true, return_dict: true });
}

/** Generate greedily, as `loopexport run` does. */
async function ask({ side, graph, prompt, maxNewTokens }) {
  const { model, ends } = await load_model(side, graph);
  const { TextStreamer, InterruptableStoppingCriteria } = library;
  const tokens = [];
  let started, first;
  stopping = new InterruptableStoppingCriteria();
  const streamer = new TextStreamer(source.tokenizer, {
    skip_prompt: true,
    token_callback_function: (ids) => {
      first ??= performance.now();
      tokens.push(...ids.map(Number));
    },
    callback_function: (text) => postMessage({ type: "text", side, text }),
  });
  postMessage({ type: "asked", side });
  started = performance.now();
  await model.generate({
    ...encode(prompt), max_new_tokens: maxNewTokens, do_sample: false, ...ends, streamer, stopping_criteria: stopping,
  });
  const seconds = (performance.now() - first) / 1000;
  return {
    type: "answered", side, tokens, seconds: (first - started) / 1000,
    rate: tokens.length > 1 ? (tokens.length - 1) / seconds : null, stopped: stopping.interrupted,
  };
}

const ACTIONS = { open, ask };

onmessage = async ({ data }) => {
  if (data.type === "stop") return stopping?.interrupt();
  try {
    postMessage(await ACTIONS[data.type](data));
  } catch (error) {
    console.error(error);
    postMessage({ type: "failed", side: data.side, message: explain(error) });
  }
};
