// The demo: prepare an image as the checkpoint's preprocessing says, run the ONNX file, list the likeliest classes.
const files = new URL("../demo/", import.meta.url);
const box = document.getElementById("demo");
const status = box.querySelector("[role=status]");
let loading = null;

async function load() {
  const answer = await fetch(new URL("model.json", files));
  if (!answer.ok) throw new Error("this copy of the site was built without npm, and has no runtime");
  const told = await answer.json();
  const ort = await import(new URL("ort.wasm.bundle.min.mjs", files).href);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", files).href };
  const session = await ort.InferenceSession.create(new URL("model.onnx", files).href);
  return { told, ort, session };
}

// The short side becomes size / crop_pct, and the middle is cut out; then (x - mean) / std for each channel.
function prepare(image, told) {
  const [channels, height, width] = told.input_size;
  const scale = Math.floor(width / told.crop_pct) / Math.min(image.width, image.height);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const [w, h] = [image.width * scale, image.height * scale];
  context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  const pixels = context.getImageData(0, 0, width, height).data;
  const values = new Float32Array(channels * height * width);
  for (let channel = 0; channel < channels; channel++) {
    for (let i = 0; i < height * width; i++) {
      values[channel * height * width + i] =
        (pixels[4 * i + channel] / 255 - told.mean[channel]) / told.std[channel];
    }
  }
  return values;
}

function likeliest(logits, labels, count) {
  const largest = Math.max(...logits);
  const parts = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = parts.reduce((a, b) => a + b);
  return parts
    .map((part, index) => ({ label: labels[index], share: part / sum }))
    .sort((a, b) => b.share - a.share)
    .slice(0, count);
}

async function label(blob) {
  try {
    status.textContent = "Loading model and runtime ...";
    loading ??= load();
    const { told, ort, session } = await loading;
    const image = await createImageBitmap(blob);
    const input = new ort.Tensor("float32", prepare(image, told), [1, ...told.input_size]);
    const start = performance.now();
    const { logits } = await session.run({ image: input });
    const time = performance.now() - start;
    const rows = likeliest(logits.data, told.labels, 5).map(({ label, share }) => {
      const row = document.createElement("li");
      row.textContent = `${label}: ${(100 * share).toFixed(1)} %`;
      return row;
    });
    box.querySelector("ol").replaceChildren(...rows);
    status.textContent = `${told.name}, ${time.toFixed(0)} ms`;
  } catch (error) {
    loading = null;
    status.textContent = `It did not run: ${error.message}`;
  }
}

async function labelExample(picture) {
  label(await (await fetch(picture.src)).blob());
}

status.textContent = "";
box.querySelector("input").addEventListener("change", (event) => {
  if (event.target.files[0]) label(event.target.files[0]);
});
for (const picture of box.querySelectorAll("[data-demo]")) {
  picture.style.cursor = "pointer";
  picture.tabIndex = 0;
  picture.addEventListener("click", () => labelExample(picture));
  picture.addEventListener("keydown", (event) => { if (event.key === "Enter") labelExample(picture); });
}
const asked = box.querySelector(`[data-demo="${CSS.escape(new URLSearchParams(location.search).get("image") ?? "")}"]`);
if (asked) labelExample(asked);
