/* The viewer of a report: three planes and a solid view of a small volume, on plain canvases, without any library. */
"use strict";
(function () {
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  const root = document.getElementById("viewer");
  if (!root) return;
  const find = (name) => root.querySelector(`[data-part="${name}"]`);
  const sources = [...document.querySelectorAll("script.volume")];
  const AXES = ["axial", "coronal", "sagittal"];
  const SIDES = [["R", "L", "A", "P"], ["R", "L", "S", "I"], ["A", "P", "S", "I"]];
  const NOT_ANNOTATED = 255;
  const state = { volume: null, cursor: [0, 0, 0], hidden: new Set(), yaw: 0.5, pitch: 0.25, loading: 0,
    zoom: 1, centre: [0, 0, 0] };
  const MOST_ZOOM = 8;

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function load(number) {
    const turn = ++state.loading;
    if (typeof DecompressionStream === "undefined") {
      find("status").textContent = "This browser is too old for the viewer (no DecompressionStream).";
      return;
    }
    const source = JSON.parse(sources[number].textContent);
    const [image, prediction, reference] = await Promise.all(
      [source.image, source.prediction, source.reference].map((text) => (text === null ? null : unpack(text))));
    if (turn !== state.loading) return; // another case was chosen meanwhile
    const [nz, ny, nx] = source.shape;
    const volume = { ...source, image, prediction, reference, strides: [ny * nx, nx, 1], surfaces: {}, middle: null };
    state.volume = volume;
    state.hidden = new Set();
    state.cursor = AXES.map((_, axis) => busiest(volume, axis));
    zoomTo(1);
    find("reference").disabled = reference === null;
    root.classList.toggle("flat", nz === 1);
    AXES.forEach((name, axis) => {
      const slider = find(`${name}-slider`);
      slider.max = String(source.shape[axis] - 1);
      slider.disabled = source.shape[axis] === 1;
    });
    const spacing = source.spacing_mm.map((s) => s.toPrecision(3)).join(" × ");
    const coarser = source.reduced.some((f) => f > 1) ? ", coarser than the file" : "";
    find("status").textContent = `${nz} × ${ny} × ${nx} voxels of ${spacing} mm${coarser}.`;
    listLabels(volume);
    draw();
  }

  function busiest(volume, axis) { // the slice with most wrong voxels, else most labelled ones
    const wrong = new Float64Array(volume.shape[axis]), marked = new Float64Array(volume.shape[axis]);
    const { prediction, reference, strides, shape } = volume;
    for (let i = 0; i < prediction.length; i++) {
      const place = Math.floor(i / strides[axis]) % shape[axis];
      if (prediction[i]) marked[place]++;
      if (reference && reference[i] !== NOT_ANNOTATED && reference[i] !== prediction[i]) wrong[place]++;
    }
    const counts = wrong.some((n) => n > 0) ? wrong : marked;
    const most = Math.max(...counts);
    return most > 0 ? counts.indexOf(most) : shape[axis] >> 1;
  }

  function listLabels(volume) {
    const there = new Set();
    for (const array of [volume.prediction, volume.reference]) if (array) array.forEach((l) => there.add(l));
    const list = find("labels");
    list.replaceChildren();
    volume.names.forEach((name, index) => {
      if (!there.has(index + 1)) return;
      const label = document.createElement("label"), box = document.createElement("input"), swatch = document.createElement("span");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => { state.hidden[box.checked ? "delete" : "add"](index + 1); draw(); });
      swatch.className = "swatch";
      swatch.style.backgroundColor = volume.colours[index];
      label.append(box, swatch, name);
      list.append(label);
    });
  }

  // ---- planes

  function layout(axis, canvas) { // how a plane lies on its canvas: patient's right on the left, up is up
    const { shape, spacing_mm: mm } = state.volume;
    const [row, column] = [0, 1, 2].filter((a) => a !== axis);
    const fitting = Math.min(canvas.width / (shape[column] * mm[column]), canvas.height / (shape[row] * mm[row]));
    const scale = fitting * state.zoom;
    const width = shape[column] * mm[column] * scale, height = shape[row] * mm[row] * scale;
    const start = (axisOf, length, room) => { // of a side that fits: in the middle; else the centre of view in the middle
      if (length <= room) return (room - length) / 2;
      return Math.max(room - length, Math.min(0, room / 2 - length * share(axisOf, state.centre[axisOf])));
    };
    return { row, column, columns: shape[column], rows: shape[row], width, height,
      left: start(column, width, canvas.width), top: start(row, height, canvas.height) };
  }

  function share(axis, place) { // where the middle of a voxel is shown, from 0 to 1 along its side of the picture
    const n = state.volume.shape[axis];
    return (state.volume.oriented ? n - place - 0.5 : place + 0.5) / n;
  }

  function zoomTo(zoom) {
    if (state.zoom === 1) state.centre = state.cursor.slice();
    state.zoom = Math.max(1, Math.min(MOST_ZOOM, zoom));
    find("zoom").value = String(state.zoom);
    draw();
  }

  function pan(axis, canvas, dx, dy) { // by pixels of the canvas
    const at = layout(axis, canvas), way = state.volume.oriented ? 1 : -1;
    for (const [a, n, length, by] of [[at.column, at.columns, at.width, dx], [at.row, at.rows, at.height, dy]]) {
      state.centre[a] = Math.max(0, Math.min(n - 1, state.centre[a] + (way * by * n) / length));
    }
    draw();
  }

  function slice(array, axis, at) { // hung as it is shown, row by row
    const { row, column, rows, columns } = at, { strides, oriented } = state.volume;
    const out = new Uint8Array(rows * columns);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const y = oriented ? rows - 1 - r : r, x = oriented ? columns - 1 - c : c;
      out[r * columns + c] = array[state.cursor[axis] * strides[axis] + y * strides[row] + x * strides[column]];
    }
    return out;
  }

  function drawPlane(axis) {
    const canvas = fit(find(AXES[axis])), context = canvas.getContext("2d"), at = layout(axis, canvas);
    const grey = slice(state.volume.image, axis, at), small = document.createElement("canvas");
    small.width = at.columns;
    small.height = at.rows;
    const pixels = new ImageData(at.columns, at.rows);
    const [low, high] = greys();
    grey.forEach((value, i) => {
      const shown = ((value - low) / (high - low)) * 255;
      pixels.data.set([shown, shown, shown, 255], 4 * i);
    });
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.fillStyle = "black";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(small, at.left, at.top, at.width, at.height);
    fillLabels(context, axis, at);
    const thick = Math.max(1.5, canvas.width / 260);
    if (state.volume.reference && find("reference").checked) outline(context, slice(state.volume.reference, axis, at), at, thick, true);
    if (find("prediction").checked) outline(context, slice(state.volume.prediction, axis, at), at, thick, false);
    if (state.volume.oriented) decorate(context, axis, at, canvas);
    const position = `${state.cursor[axis] + 1} of ${state.volume.shape[axis]}`;
    find(`${AXES[axis]}-caption`).textContent = position;
    const slider = find(`${AXES[axis]}-slider`);
    slider.value = String(state.cursor[axis]);
    slider.setAttribute("aria-valuetext", `${AXES[axis]} slice ${position}`);
  }

  function greys() { // of the 8-bit image: what is black, what is white
    const middle = 255 - Number(find("brightness").value), half = Math.max(1, 256 - Number(find("contrast").value)) / 2;
    return [middle - half, middle + half];
  }

  function tellWindow() { // in the units of the file
    const [least, most] = state.volume.window, digits = most - least > 20 ? 0 : 2;
    const [low, high] = greys().map((grey) => (least + (grey / 255) * (most - least)).toFixed(digits));
    find("window").textContent = `${low} is black, ${high} is white`;
  }

  function fillLabels(context, axis, at) { // inside of the prediction, or of the reference if that is all that is shown
    const opacity = Number(find("fill").value) / 100;
    const { reference, prediction, colours } = state.volume;
    const source = find("prediction").checked ? prediction : reference && find("reference").checked ? reference : null;
    if (!opacity || !source) return;
    const labels = slice(source, axis, at), small = document.createElement("canvas"), pixels = new ImageData(at.columns, at.rows);
    const rgb = colours.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    labels.forEach((label, i) => {
      if (label !== 0 && label !== NOT_ANNOTATED && !state.hidden.has(label)) pixels.data.set([...rgb[label - 1], 255 * opacity], 4 * i);
    });
    small.width = at.columns;
    small.height = at.rows;
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, at.left, at.top, at.width, at.height);
    context.imageSmoothingEnabled = true;
  }

  function outline(context, labels, at, thick, dashed) { // along the faces of voxels; dashed: the middle of each face
    const paths = new Map(), w = at.width / at.columns, h = at.height / at.rows, gap = dashed ? 0.25 : 0;
    const value = (r, c) => (r < 0 || c < 0 || r >= at.rows || c >= at.columns ? 0 : labels[r * at.columns + c]);
    const add = (label, r0, c0, r1, c1) => {
      if (label === 0 || label === NOT_ANNOTATED || state.hidden.has(label)) return;
      if (!paths.has(label)) paths.set(label, new Path2D());
      const x0 = at.left + c0 * w, y0 = at.top + r0 * h, dx = (c1 - c0) * w, dy = (r1 - r0) * h;
      paths.get(label).moveTo(x0 + gap * dx, y0 + gap * dy);
      paths.get(label).lineTo(x0 + (1 - gap) * dx, y0 + (1 - gap) * dy);
    };
    for (let r = 0; r <= at.rows; r++) for (let c = 0; c <= at.columns; c++) {
      const here = value(r, c), over = value(r - 1, c), before = value(r, c - 1);
      if (here !== over) { add(here, r, c, r, c + 1); add(over, r, c, r, c + 1); }
      if (here !== before) { add(here, r, c, r + 1, c); add(before, r, c, r + 1, c); }
    }
    context.lineWidth = thick;
    context.lineCap = dashed ? "butt" : "square";
    for (const [label, path] of paths) { context.strokeStyle = state.volume.colours[label - 1]; context.stroke(path); }
  }

  function decorate(context, axis, at, canvas) {
    const x = at.left + at.width * share(at.column, state.cursor[at.column]), y = at.top + at.height * share(at.row, state.cursor[at.row]);
    context.strokeStyle = "rgba(255, 255, 255, 0.45)";
    context.lineWidth = 1;
    context.beginPath();
    for (const [a, b, c, d] of [[0, y, x - 12, y], [x + 12, y, canvas.width, y], [x, 0, x, y - 12], [x, y + 12, x, canvas.height]]) {
      context.moveTo(a, b);
      context.lineTo(c, d);
    }
    context.stroke();
    const size = Math.max(11, Math.min(canvas.width / 24, 16 * (devicePixelRatio || 1))), [left, right, top, bottom] = SIDES[axis];
    context.font = `${size}px sans-serif`;
    context.fillStyle = "white";
    context.textBaseline = "middle";
    context.textAlign = "center";
    context.fillText(left, size * 0.7, canvas.height / 2);
    context.fillText(right, canvas.width - size * 0.7, canvas.height / 2);
    context.fillText(top, canvas.width / 2, size * 0.8);
    context.fillText(bottom, canvas.width / 2, canvas.height - size * 0.7);
  }

  // ---- solid view: the voxels at the surface of each label, nearest in front

  const FACES = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], BALL = [];
  for (let a = -2; a <= 2; a++) for (let b = -2; b <= 2; b++) for (let c = -2; c <= 2; c++) if (a * a + b * b + c * c < 6) BALL.push([a, b, c]);

  function surface(name) {
    const volume = state.volume;
    if (volume.surfaces[name]) return volume.surfaces[name];
    const labels = volume[name], [nz, ny, nx] = volume.shape, found = [];
    for (let z = 0, i = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, i++) {
      const label = labels[i];
      if (label === 0 || label === NOT_ANNOTATED) continue;
      const open = (a, b, c) => {
        const inside = x + c >= 0 && x + c < nx && y + b >= 0 && y + b < ny && z + a >= 0 && z + a < nz;
        return !(inside && labels[i + (a * ny + b) * nx + c] === label);
      };
      const bare = FACES.some((f) => open(...f));
      if (!bare) continue;
      const normal = [0, 0, 0]; // away from the label, over a few voxels: single faces would look like bricks
      for (const [a, b, c] of BALL) if (open(a, b, c)) { normal[0] += c; normal[1] += b; normal[2] += a; }
      found.push(label, x, y, z, ...normal);
    }
    const points = Float32Array.from(found);
    volume.middle = volume.middle || [1, 2, 3].map((i) => { // of what is shown first, so that nothing jumps
      let low = Infinity, high = -Infinity;
      for (let p = i; p < points.length; p += 7) { low = Math.min(low, points[p]); high = Math.max(high, points[p]); }
      return points.length ? (low + high) / 2 : 0;
    });
    for (let p = 0; p < points.length; p += 7) for (const i of [1, 2, 3]) points[p + i] -= volume.middle[i - 1];
    volume.surfaces[name] = points;
    return points;
  }

  function drawSolid() {
    if (state.volume.shape[0] === 1) return;
    const canvas = fit(find("solid")), size = canvas.width, context = canvas.getContext("2d");
    const name = find("reference").checked && !find("prediction").checked && state.volume.reference ? "reference" : "prediction";
    const points = surface(name), mm = state.volume.spacing_mm, pixels = new ImageData(size, size);
    const depth = new Float32Array(size * size).fill(-Infinity);
    const colours = state.volume.colours.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    let reach = 1;
    for (let p = 0; p < points.length; p += 7) reach = Math.max(reach, Math.hypot(points[p + 1] * mm[2], points[p + 2] * mm[1], points[p + 3] * mm[0]));
    const scale = (0.47 * size) / reach, dot = Math.ceil((Math.max(...mm) * scale) / 2) + 1;
    const [cy, sy, cp, sp] = [Math.cos(state.yaw), Math.sin(state.yaw), Math.cos(state.pitch), Math.sin(state.pitch)];
    const turn = (x, y, z) => { // from the front: patient's right on the left, superior up, anterior towards us
      const a = -x * cy + y * sy, b = x * sy + y * cy;
      return [a, z * cp - b * sp, b * cp + z * sp];
    };
    for (let p = 0; p < points.length; p += 7) {
      if (state.hidden.has(points[p])) continue;
      const [u, v, w] = turn(points[p + 1] * mm[2], points[p + 2] * mm[1], points[p + 3] * mm[0]);
      const [nu, nv, nw] = turn(points[p + 4], points[p + 5], points[p + 6]);
      const light = 0.35 + 0.65 * Math.max(0, (0.25 * nu + 0.4 * nv + 0.88 * nw) / (Math.hypot(nu, nv, nw) || 1));
      const colour = colours[points[p] - 1], cx = Math.round(size / 2 + u * scale), cyy = Math.round(size / 2 - v * scale);
      for (let j = Math.max(0, cyy - dot); j <= Math.min(size - 1, cyy + dot); j++) {
        for (let i = Math.max(0, cx - dot); i <= Math.min(size - 1, cx + dot); i++) {
          const k = j * size + i;
          if (w <= depth[k]) continue;
          depth[k] = w;
          pixels.data.set([colour[0] * light, colour[1] * light, colour[2] * light, 255], 4 * k);
        }
      }
    }
    for (let k = 3; k < pixels.data.length; k += 4) pixels.data[k] = 255;
    context.putImageData(pixels, 0, 0);
    find("solid-caption").textContent = `${name}, drag to turn`;
  }

  // ---- page

  function fit(canvas) {
    const side = Math.max(120, Math.min(720, Math.round(canvas.clientWidth * Math.min(2, devicePixelRatio || 1))));
    if (canvas.width !== side) canvas.width = canvas.height = side;
    return canvas;
  }

  let asked = false;
  function draw() {
    if (asked || !state.volume) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      tellWindow();
      if (state.volume.shape[0] === 1) drawPlane(0);
      else { AXES.forEach((_, axis) => drawPlane(axis)); drawSolid(); }
      root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1);
    });
  }

  function move(axis, to) {
    state.cursor[axis] = Math.max(0, Math.min(state.volume.shape[axis] - 1, to));
    const seen = state.volume.shape[axis] / state.zoom / 2; // at most; the crosshair stays in view
    state.centre[axis] = Math.max(state.cursor[axis] - seen + 1, Math.min(state.cursor[axis] + seen - 1, state.centre[axis]));
    draw();
  }

  function drag(canvas, act, pinch = () => {}) { // one pointer, or two that pinch
    const held = new Map();
    const spread = () => { const [p, q] = held.values(); return Math.hypot(p.clientX - q.clientX, p.clientY - q.clientY); };
    canvas.addEventListener("pointerdown", (e) => {
      held.set(e.pointerId, e);
      canvas.setPointerCapture(e.pointerId);
      if (held.size === 1) act(e, 0, 0);
    });
    canvas.addEventListener("pointermove", (e) => {
      const last = held.get(e.pointerId);
      if (!last) return;
      const before = held.size === 2 ? spread() : 0, [dx, dy] = [e.clientX - last.clientX, e.clientY - last.clientY];
      held.set(e.pointerId, e);
      if (held.size === 2) pinch(spread() / Math.max(1, before), dx / 2, dy / 2);
      else if (held.size === 1) act(e, dx, dy);
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (e) => held.delete(e.pointerId));
  }

  function enlarge(name) { // one view, or none if it is large already
    root.querySelectorAll(".views figure").forEach((figure) => {
      const large = figure.contains(find(name)) && !figure.classList.contains("large");
      figure.classList.toggle("large", large);
      figure.querySelector("button").setAttribute("aria-pressed", String(large));
    });
    find("views").classList.toggle("one-large", root.querySelector(".views .large") !== null);
    draw();
  }

  const zoomKeys = { "+": 1.25, "=": 1.25, "-": 0.8, "0": 0 };
  AXES.forEach((name, axis) => {
    const canvas = find(name);
    const pixels = (length) => (length / canvas.getBoundingClientRect().width) * canvas.width;
    find(`${name}-slider`).addEventListener("input", (e) => move(axis, Number(e.target.value)));
    drag(canvas, (e, dx, dy) => {
      if (!state.volume) return;
      if (e.shiftKey || !state.volume.oriented) return void pan(axis, canvas, pixels(dx), pixels(dy));
      const box = canvas.getBoundingClientRect(), at = layout(axis, canvas);
      const x = pixels(e.clientX - box.left), y = pixels(e.clientY - box.top);
      move(at.column, Math.floor(at.columns - ((x - at.left) / at.width) * at.columns));
      move(at.row, Math.floor(at.rows - ((y - at.top) / at.height) * at.rows));
    }, (by, dx, dy) => { if (state.volume) { zoomTo(state.zoom * by); pan(axis, canvas, pixels(dx), pixels(dy)); } });
    const step = (e, by) => { if (state.volume) { e.preventDefault(); move(axis, state.cursor[axis] + by); } };
    canvas.addEventListener("wheel", (e) => {
      if (e.ctrlKey || e.metaKey) { e.preventDefault(); zoomTo(state.zoom * Math.exp(-e.deltaY / 200)); }
      else if (document.activeElement === canvas) step(e, Math.sign(e.deltaY));
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      if (["ArrowUp", "ArrowRight"].includes(e.key)) step(e, 1);
      else if (["ArrowDown", "ArrowLeft"].includes(e.key)) step(e, -1);
      else if (e.key in zoomKeys && !e.ctrlKey && !e.metaKey) { e.preventDefault(); zoomTo(state.zoom * zoomKeys[e.key]); }
    });
  });
  root.querySelectorAll(".views button").forEach((button) => button.addEventListener("click", () => enlarge(button.dataset.enlarge)));
  const turned = (yaw, pitch) => { state.yaw += yaw; state.pitch = Math.max(-1.5, Math.min(1.5, state.pitch + pitch)); draw(); };
  drag(find("solid"), (_, dx, dy) => turned(dx / 90, dy / 90));
  find("solid").addEventListener("keydown", (e) => {
    const turns = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] };
    if (turns[e.key]) { e.preventDefault(); turned(...turns[e.key]); }
  });
  find("zoom").addEventListener("input", (e) => zoomTo(Number(e.target.value)));
  for (const name of ["prediction", "reference", "brightness", "contrast", "fill"]) find(name).addEventListener("input", draw);
  find("case").addEventListener("change", (e) => load(Number(e.target.value)));
  document.querySelectorAll("[data-view]").forEach((button) => button.addEventListener("click", () => {
    find("case").value = button.dataset.view;
    load(Number(button.dataset.view));
    document.getElementById("viewer-section").scrollIntoView();
  }));
  addEventListener("resize", draw);
  load(Number(find("case").value));
})();
