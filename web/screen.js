/* The screen of a node: frames while they are made, then the file, with what a player has: pause, seek, speed, full
 * screen, save. All of it works from the keyboard: space, arrows, Home, End, f.
 */

import { Film } from "./film.js";

const SPEEDS = [0.25, 0.5, 1, 2];
const ICONS = {
  play: "M4 2l10 6-10 6z",
  pause: "M3 2h4v12H3zM9 2h4v12H9z",
  save: "M7 1h2v6h3l-4 5-4-5h3zM2 13h12v2H2z",
  still: "M1 4h3l1-2h6l1 2h3v10H1zM8 6a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  full: "M1 1h5v2H3v3H1zM10 1h5v5h-2V3h-3zM1 10h2v3h3v2H1zM13 10h2v5h-5v-2h3z",
};
const IDLE = "The video plays here while it is made.";
const STYLE = `
.self-forcing-screen { position: relative; width: 100%; height: 100%; min-height: 180px; overflow: hidden;
  display: flex; flex-direction: column; background: #111; color: #ddd; font: 11px sans-serif; }
.self-forcing-screen:focus-visible { outline: 2px solid #6af; outline-offset: -2px; }
.self-forcing-screen .stage { position: relative; flex: 1; min-height: 0; cursor: pointer; }
.self-forcing-screen .stage > canvas, .self-forcing-screen .stage > video {
  position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.self-forcing-screen .small > * { image-rendering: pixelated; }
.self-forcing-screen .sign { position: absolute; inset: 0; margin: auto; width: 40px; height: 40px; border-radius: 50%;
  background: #0009; pointer-events: none; }
.self-forcing-screen .sign > svg { display: block; width: 16px; height: 16px; margin: 12px; }
.self-forcing-screen .label { padding: 2px 6px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.self-forcing-screen .bar { display: flex; align-items: center; gap: 4px; padding: 0 4px 2px; }
.self-forcing-screen .bar > input { flex: 1; min-width: 30px; height: 12px; margin: 0; }
.self-forcing-screen .bar > button, .self-forcing-screen .bar > select { min-width: 20px; height: 20px; padding: 0 3px;
  border: 0; border-radius: 3px; background: #333; color: #ddd; font: inherit; cursor: pointer; }
.self-forcing-screen [hidden] { display: none; }`;

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
const pathOf = (file) => (file.subfolder ? `${file.subfolder}/${file.filename}` : file.filename);

function create(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function icon(name) {
  const path = `<path d="${ICONS[name]}"/>`;
  return `<svg viewBox="0 0 16 16" width="11" height="11" fill="currentColor" fill-rule="evenodd">${path}</svg>`;
}

function mark(element, sign, title) {
  if (element.title === title) return;
  element.innerHTML = icon(sign);
  element.title = title;
  element.setAttribute("aria-label", title);
}

function button(sign, title, act) {
  const made = create("button", { type: "button", onclick: act });
  mark(made, sign, title);
  return made;
}

function save(url, filename) {
  const link = create("a", { href: url, download: filename });
  document.body.append(link);
  link.click();
  link.remove();
}

export class Screen {
  #observer;
  #clock;
  #decoded = 0;
  #seenPart = false;

  /** urlOf: where a file is served; forward: gives an event to the graph's canvas. */
  constructor({ urlOf, forward }) {
    this.urlOf = urlOf;
    this.chosen = 0; // which video of a batch
    this.#build();
    this.#listen(forward);
    this.watch(null);
  }

  #build() {
    const id = "self-forcing-style";
    document.getElementById(id) ?? document.head.append(create("style", { id, textContent: STYLE }));
    this.canvas = create("canvas", { width: 0, height: 0 });
    this.sign = create("div", { className: "sign", innerHTML: icon("pause"), hidden: true });
    this.stage = create("div", { className: "stage", onclick: () => this.toggle() }, this.canvas, this.sign);
    this.label = create("div", { className: "label" });
    this.play = button("pause", "Pause (space)", () => this.toggle());
    this.seek = create("input", { type: "range", min: 0, max: 1, step: "any", value: 0, title: "Position" });
    this.seek.setAttribute("aria-label", "Position");
    this.seek.oninput = () => this.source && (this.source.time = Number(this.seek.value));
    this.time = create("span", { textContent: "" });
    this.speed = create("select", { title: "Speed" }, ...SPEEDS.map((speed) => new Option(`${speed}×`, speed)));
    this.speed.value = 1;
    this.speed.onchange = () => this.source && (this.source.speed = Number(this.speed.value));
    this.pick = create("select", { title: "Which video of the batch", hidden: true });
    this.pick.onchange = () => this.choose(this.pick.selectedIndex);
    this.keep = button("save", "Save video", () => this.saveVideo());
    this.still = button("still", "Save frame", () => this.saveFrame());
    this.full = button("full", "Full screen (f)", () => this.fullScreen());
    const parts = [this.play, this.seek, this.time, this.speed, this.pick, this.keep, this.still, this.full];
    this.bar = create("div", { className: "bar" }, ...parts);
    this.element = create("div", { className: "self-forcing-screen", tabIndex: 0 }, this.stage, this.label, this.bar);
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", "Video player");
  }

  #listen(forward) {
    const { element } = this;
    element.addEventListener("keydown", (event) => this.key(event));
    const scroll = (event) => document.fullscreenElement === element || forward(event);
    element.addEventListener("wheel", scroll, { passive: false });
    for (const type of ["pointerdown", "pointermove", "pointerup"])
      element.addEventListener(type, forward, { capture: true });
    this.#observer = new IntersectionObserver(([entry]) => {
      this.#seenPart = entry.isIntersecting;
      this.see();
    });
    this.#observer.observe(element);
    this.see = () => {
      const seen = this.#seenPart && !document.hidden;
      if (this.source) this.source.seen = seen;
      clearInterval(this.#clock);
      if (seen && this.source) this.#clock = setInterval(() => this.tell(), 250);
    };
    document.addEventListener("visibilitychange", this.see);
  }

  /** Ends it: its node is gone. */
  close() {
    this.watch(null);
    clearInterval(this.#clock);
    this.#observer.disconnect();
    document.removeEventListener("visibilitychange", this.see);
  }

  /** Shows another Video; null: none. */
  watch(video) {
    if (this.video === video) return;
    if (this.video) this.video.changed = () => {};
    this.#leave();
    this.video = video;
    this.chosen = 0;
    this.canvas.hidden = true;
    if (video) video.changed = () => this.update();
    this.update();
  }

  #leave() {
    if (this.source) this.source.seen = false;
    if (this.source instanceof Film) this.source.close();
    this.source = null;
  }

  /** Brings the screen in step with its Video, which has changed. */
  update() {
    const { video } = this;
    const file = video?.files[Math.min(this.chosen, video.files.length - 1)];
    const url = file && this.urlOf(file);
    if (url) {
      if (this.source?.url !== url) this.#showFile(url);
    } else if (video?.frames && this.source !== video.player) {
      this.#leave();
      video.player.show = (frames) => this.show(frames[this.chosen] ?? frames[0]);
      this.#enter(video.player);
    }
    const batch = video?.batch ?? 1;
    this.pick.hidden = batch < 2;
    if (this.pick.length !== batch)
      this.pick.replaceChildren(...Array.from({ length: batch }, (_, i) => new Option(`${i + 1} of ${batch}`)));
    this.keep.hidden = !file;
    this.bar.style.display = this.source ? "" : "none";
    this.tell();
  }

  #showFile(url) {
    const time = this.source?.time ?? 0;
    const { paused = false } = this.source ?? {};
    this.#leave();
    const film = new Film(url);
    film.url = url;
    film.element.onloadeddata = () => {
      if (this.source !== film) return;
      this.stage.classList.toggle("small", film.element.videoWidth < 256);
      this.canvas.hidden = true; // until now the last frame stood there
      if (time < film.duration) film.time = time;
      this.video.player.frames = [];
      this.tell();
    };
    film.element.onerror = () => {
      film.broken = this.source === film;
      this.tell();
    };
    this.canvas.after(film.element);
    this.#enter(film);
    film.paused = paused;
  }

  #enter(source) {
    this.source = source;
    source.speed = Number(this.speed.value);
    this.see();
  }

  /** Draws a frame, a JPEG in base64. */
  async show(frame) {
    const turn = ++this.#decoded;
    const bytes = Uint8Array.from(atob(frame), (character) => character.charCodeAt(0));
    const picture = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    if (turn === this.#decoded && this.source === this.video?.player) {
      const { width, height } = picture; // a picture that is drawn is empty
      if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
      this.stage.classList.toggle("small", width < 256);
      this.canvas.hidden = false;
      this.canvas.getContext("bitmaprenderer").transferFromImageBitmap(picture);
      this.tell();
    } else picture.close(); // a later frame was quicker
  }

  // --- What it says -------------------------------------------------------------------------------------------------

  /** The line below: what is going on, or what the file is. */
  told() {
    const { video } = this;
    if (!video) return IDLE;
    const { files, facts, player, rate, status } = video;
    if (files.length) {
      const stopped = facts.stopped ? `, stopped after ${facts.frames} of ${facts.length} frames` : "";
      const seed = facts.seed === undefined ? "" : `, seed ${facts.seed}`;
      const broken = this.source?.broken ? " - is gone, or cannot be played" : "";
      const path = pathOf(files[Math.min(this.chosen, files.length - 1)]);
      return `${status && `${status} - `}${path}${stopped}${seed}${broken}`;
    }
    if (!video.frames) return status || IDLE;
    const pace = rate ? `, ${rate.toFixed(1)} per second` : "";
    const shown = Math.max(player.next, player.first + 1); // as people count, from 1
    return `frame ${shown} of ${player.length}, ${player.made} made${pace}${status && `, ${status}`}`;
  }

  tell() {
    const text = this.told();
    if (this.label.textContent !== text) this.label.title = this.label.textContent = text;
    const { source } = this;
    if (!source) return;
    this.sign.hidden = !source.paused;
    mark(this.play, source.paused ? "play" : "pause", source.paused ? "Play (space)" : "Pause (space)");
    this.seek.max = source.duration || 1;
    if (document.activeElement !== this.seek || !source.paused) this.seek.value = source.time;
    this.time.textContent = `${clock(source.time)} / ${clock(source.duration)}`;
  }

  // --- What one can do ----------------------------------------------------------------------------------------------

  toggle() {
    if (!this.source) return;
    this.source.paused = !this.source.paused;
    this.tell();
  }

  /** Goes forth or back by so many frames, and stays there. */
  step(frames) {
    if (!this.source) return;
    this.source.paused = true;
    this.source.time += frames / (this.video.facts.frame_rate ?? this.video.player.fps ?? 16);
    this.tell();
  }

  choose(number) {
    this.chosen = number;
    this.update();
    if (this.source === this.video.player) this.source.time = this.source.time; // draws it again
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.element.requestFullscreen();
  }

  get fileUrl() {
    return this.source instanceof Film ? this.source.url : null;
  }

  saveVideo() {
    const file = this.video?.files[this.chosen];
    if (file) save(this.urlOf(file), file.filename);
  }

  /** Saves the frame that is shown as a PNG. */
  saveFrame() {
    const shown = this.source instanceof Film ? this.source.element : this.canvas;
    const [width, height] = [shown.videoWidth ?? shown.width, shown.videoHeight ?? shown.height];
    if (!width) return;
    const copy = create("canvas", { width, height });
    copy.getContext("2d").drawImage(shown, 0, 0);
    const stem = this.video.files[this.chosen]?.filename.replace(/\.\w+$/, "") ?? "self_forcing";
    copy.toBlob((blob) => {
      const url = URL.createObjectURL(blob);
      save(url, `${stem}_${this.source.time.toFixed(2)}s.png`);
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
  }

  key(event) {
    const control = event.target.closest("input, select, button");
    const acts = {
      " ": () => this.toggle(),
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      Home: () => this.source && (this.source.time = 0),
      End: () => this.source && (this.source.time = this.source.duration),
      f: () => this.fullScreen(),
    };
    const act = acts[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation(); // or the graph takes it
    if (control && event.key !== "f") return; // a button takes space, a slider the arrows
    event.preventDefault();
    act();
  }
}
